"""Word lists of the embedded world. Every word is one token of the embedded tokenizer, surnames too."""

from __future__ import annotations

FIRST_NAMES = """Ada Alma Anton Arlo Basil Bianca Bruno Cara Casper Celia Clara Conrad Dalia Darius Dora Edgar
Elena Elias Emil Esther Fabian Felix Flora Frida Gideon Gloria Greta Hector Helga Hugo Ines Irma Isaac Ivo Jasper
Joanna Jonas Judith Karl Klara Leona Linus Lydia Lucas Magda Marius Milo Mona Nadia Nestor Nora Odette Olaf Otto
Petra Quentin Ramona Rufus Selma Silas Tamara Tobias Ursula Viktor""".split()

_SURNAME_STARTS = """Al Bar Bel Bor Bren Cal Cor Dal Del Dor Fal Fen For Gal Gar Gol Hal Har Hel Jor Kal Kel Kor Lan
Lor Mal Mar Mel Mor Nal Nor Pel Por Ral Ros Sal Sel Tal Tor Val""".split()

_SURNAME_ENDS = """ba bek bert by dan dek dorf der dil don fax fer gan gard gin go ham hart hurst kin la lake land let
low man mere mond na ner nick quist ric rin sby sen son stad thorpe vik""".split()

SURNAMES = [start + end for start in _SURNAME_STARTS for end in _SURNAME_ENDS]

_CITY_STARTS = "Aster Bram Crest Dun Elder Frost Glen Hazel Iron Juni Kings Lark Mill North Oak Quill".split()
_CITY_ENDS = "bridge ford haven wick".split()
CITIES = [start + end for start in _CITY_STARTS for end in _CITY_ENDS]

TRADES = """actor baker banker barber botanist brewer butcher carpenter chemist clerk cobbler cook cooper dancer
dentist diver doctor editor engineer farmer fisher florist gardener glazier goldsmith grocer guard hatter hunter
jeweler judge lawyer librarian locksmith mason mechanic merchant midwife miller miner nurse optician painter
pharmacist pilot plumber porter potter printer roofer sailor sculptor shepherd singer smith soldier surgeon tailor
tanner teacher typist waiter weaver welder""".split()

HOBBIES = """archery astronomy badminton baking beekeeping billiards bowling boxing calligraphy camping canoeing
carving chess climbing cooking cricket croquet curling cycling dancing darts diving drawing embroidery fencing
fishing gardening golf gymnastics hiking hockey juggling karate kayaking knitting magic marbles origami painting
photography poetry pottery puzzles quilting riding rowing rugby running sailing sculpting sewing singing skating
skiing snorkeling squash surfing swimming tennis trekking volleyball weaving wrestling yoga""".split()

PRIZES = """Acorn Agate Amber Anchor Anvil Apple Arrow Badger Beacon Bell Birch Bronze Candle Cedar Cherry Clover
Comet Compass Copper Coral Cornet Crane Crystal Dagger Dolphin Eagle Ebony Ember Falcon Feather Fern Flame Garnet
Granite Harp Heron Holly Ivory Ivy Jade Juniper Lantern Laurel Lily Lotus Lynx Marble Maple Meteor Olive Onyx Opal
Orchid Otter Pearl Pine Quartz Raven Ruby Sapphire Silver Sparrow Topaz Willow""".split()

ADJECTIVES = """Ancient Bitter Bold Brave Bright Broken Burning Calm Clever Cold Crooked Cruel Dark Deep Distant
Empty Endless Faded Fallen Final First Frozen Gentle Golden Hidden Hollow Humble Lonely Lost Loud Lucky Narrow
Noble Patient Proud Quiet Royal Sacred Secret Silent Simple Sleeping Stolen Tender Twisted Wicked Wild
Wounded""".split()

NOUNS = """Ballad Bridge Canyon Castle Cathedral Circle Clock Crown Desert Dream Empire Engine Fever Forest Fountain
Garden Gate Harbor Harvest Island Journey Kingdom Labyrinth Letter Library Lighthouse Meadow Mirror Monument
Mountain Ocean Orchard Palace Promise River Rumor Shadow Shore Song Storm Summer Temple Theater Tower Valley Village
Voyage Winter""".split()

REGIONS = """Ambria Bolvia Cadria Delmora Estria Fennia Gelda Hessia Istria Jovia Kelda Lumeria Mordia Nevaria
Ostia Palmyra""".split()
RIVERS = """Adra Bena Cira Dova Elba Fira Gora Hesa Ilma Jura Kura Lena Mosa Neva Oder Pola Quora Rona Saba Tana
Ulma Vena Wisa Xera Yara Zola Arno Brea Cora Deva Esla Fala""".split()
DISHES = """bacon beans bread broth cabbage cheese chowder cider crab curry custard dumplings eels goulash ham honey
jam lamb lentils lobster mussels mustard noodles pancakes pastry pie porridge rice salmon sausage soup
trout""".split()
FESTIVALS = """Barrel Basket Blossom Boat Bonfire Bubble Button Carnival Chestnut Cloud Drum Fiddle Flute Goose
Hammer Kite Ladder Lamb Mask Moon Onion Paper Plum Pumpkin Puppet Ribbon Rose Snow Straw Sun Torch
Whistle""".split()

KIDS = """Amy Ann Ben Bob Dan Eva Gus Ian Jack Jane Joe Kate Kim Leo Lucy Max Meg Mia Nick Pam Pat Peg Roy Sam Sue
Ted Tim Tom Tina Una Will Zoe""".split()
ANIMALS = "bear bird cat cow dog duck fox frog goat hen horse mouse pig rabbit sheep wolf".split()
OBJECTS = "ball basket book box cake cup doll drum hat key lamp map ring rope stone toy".split()
COLORS = "big black blue brown green new old red round shiny small soft white yellow".split()
PLACES = "barn beach bridge farm field forest garden hill house lake market mill park river school shop".split()
FEELINGS = "angry brave calm happy hungry proud sad scared sleepy tired".split()
