"""The embedded word list, and the closed label sets that every split shares."""

from __future__ import annotations

# Words that label things in every split: answers such as colours and places, titles such as "total". What they are made
# of is never held out.
LABELS: tuple[str, ...] = (
    *("red", "green", "blue", "orange", "purple", "black", "brown", "pink", "teal"),
    *("left", "right", "top", "bottom", "middle"),
    *("circle", "square", "triangle"),
    *("total", "date", "receipt", "thank you"),
    *("dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt"),
)

_NOUNS = """
acorn almond amber anchor angle apple apron arch arm arrow ash atlas attic autumn axe badge bag bagel baker balm
bamboo banana band bank barley barn barrel basil basin basket bat bath beach bead beam bean bear beard beaver bed bee
beef beetle bell belt bench berry bike birch bird biscuit blanket blade block boat bolt bone book boot border bottle
bow bowl box branch brass bread brick bridge broom brush bucket buckle bud bulb bun bus bush butter button cabbage
cabin cable cactus cage cake camel camera camp canal candle candy cane canoe canvas cap cape car card carpet carrot
cart cashew castle cat cave cedar celery cello chain chair chalk cheese cherry chess chest chicken chin chip cider
cigar cinema city clam clay cliff clock cloth cloud clover coal coast coat cobra cocoa coffee coin collar comb comet
compass cookie copper coral cord corn corner cotton couch cow crab cradle crane crate cream cricket crow crown crust
cube cup curry curtain cushion dairy daisy dam dart deck deer desert desk dew dial diary dice dish ditch dock doctor
dog doll dolphin donkey door dove dragon drain drawer drill drum duck dune dust eagle ear earth easel egg elbow elm
engine envelope fabric face falcon farm fan feast feather fence fern ferry fiddle field fig file film finger fir fire
fish flag flame flask fleece flint floor flour flower flute foam fog folder food foot forest fork fossil fountain fox
frame frog frost fruit funnel fur galaxy garage garden garlic gate gear gem ghost giant ginger giraffe glacier glass
globe glove glue goat gold goose gown grain granite grape grass gravel gravy guitar gum hail ham hammer hand handle
harbour hare harp harvest hawk hay hazel heart heater hedge helmet hen herb heron hill hinge hive holly honey hood
hook horn horse hose hotel house hut ice icon igloo ink inn insect iris iron island ivory ivy jacket jaguar jam jar
jaw jewel juice jug jungle kernel kettle key kiln kitchen kite kiwi knee knife knot label lace ladder lake lamb lamp
lantern lark lava lawn leaf leather lemon lens lentil letter lettuce lid lily lime linen lion lizard llama lobster
lock log loom lotus lumber lynx magnet mango mantle maple marble market marsh mask mast maze meadow melon mesh metal
milk mill mint mirror mitten mole monkey moon moss moth motor mountain mouse mud muffin mug mule mushroom mustard nail
napkin neck needle nest net nettle noodle nose nut nutmeg oak oar oasis oat ocean octopus olive onion opal orchard
orchid organ otter oven owl oyster paddle page paint palace palm pan panda pantry paper parcel park parrot parsley
pasta pasty path paw pea peach pearl pebble pedal pen pencil pepper petal piano pickle pie pig pigeon pillow pilot
pine pipe pizza plain planet plank plate plum pocket pole pond pony poppy porch port potato pot powder prism prune
pump pumpkin puppet puzzle quail quartz quill quilt rabbit radar radio radish raft rail rain raisin ram ramp ranch
raven razor reed reef ribbon rice ridge ring river road robin robot rock rocket roof room root rope rose ruby rudder
rug ruler rye saddle sage sail salad salmon salt sand sandal satin sauce saucer scarf school scissors screen screw sea
seal seed shadow shark sheep shelf shell ship shoe shore shovel silk silver sink siren ski sky slate sled sleeve
slipper snail snow soap sock sofa soil soup spade spark spice spider spinach spoon spring spruce squid stable stag
stair stamp star station steam steel stem stone stool storm stove straw stream street string studio sugar suit summer
sun swan sweater swing sword syrup table tablet tail tailor tank tape tart tea temple tent thimble thorn thread throne
thumb thunder ticket tide tiger tile timber tin toast toe tomato tongue tool tooth torch towel tower town toy track
tractor train tray tree trout truck trumpet trunk tulip tuna tunnel turkey turnip turtle umbrella uncle urn valley van
vanilla vase velvet vest village vine vinegar violet violin wagon waffle wall wallet walnut walrus wand wasp watch
water wave wax web well whale wheat wheel whistle wick widow willow wind window wine wing winter wire wolf wood wool
worm wrench wrist yacht yak yam yard yarn yeast yogurt zebra zinc zoo
"""

# Plain nouns and names of goods, 3 to 8 letters.
ENGLISH: tuple[str, ...] = tuple(_NOUNS.split())
