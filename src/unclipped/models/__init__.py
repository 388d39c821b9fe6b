"""The composite vision-language model, its processor and its assembly from two checkpoints."""
