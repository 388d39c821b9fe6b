"""Import of checkpoints as their authors published them: files, names, shapes, keys."""
