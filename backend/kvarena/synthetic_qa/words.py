"""The words that towns are made of. No word stands in two pools, so a value tells what it is the value of."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WOMEN = _words(
    "Mara Ines Tilda Odile Petra Wanda Greta Nora Lena Hilde Runa Sabine Thea Ursel Vera Yda Agnes Brina Cora Dora "
    "Edda Fenna Gerda Hanne Isolde Jutta Karin Lotte Mina Nelle Orla Pia Quenna Rosa Selma Tove Una Vilja Willa "
    "Zora Alma Berta Carla Delia Elsa Flora Gilda Hazel Irma Judith Klara Livia Magda Nadia Olga Paula Rhea Stella "
    "Tessa Viola"
)
MEN = _words(
    "Rolf Anton Bruno Casper Dirk Emil Falk Gregor Hugo Ivo Jasper Kurt Lorenz Marek Nils Otto Pavel Quint Ralf "
    "Stefan Theo Ulf Viktor Walter Xaver Yorick Zeno Aldo Bernd Conrad Didrik Edgar Felix Gustav Henrik Igor Jonas "
    "Kaspar Leon Milo Norbert Oskar Piet Rufus Silas Tobias Urban Vito Wendel Abel Basil Cyril Dorian Ernst Franz "
    "Gideon Horst Isaac Jakob Ludo"
)
PEOPLE = WOMEN + MEN
NICKNAMES = _words(
    "Heron Badger Otter Magpie Fox Hare Jackdaw Kingfisher Lynx Mole Nightingale Osprey Partridge Raven Stag Toad "
    "Viper Walrus Adder Bittern Curlew Dormouse Ermine Gander Hornet Ibis Kestrel Lark Marten Plover"
)
SHOPS = _words(
    "Anchor Crown Lion Bell Compass Feather Goose Hammer Key Lamp Mirror Needle Pot Spoon Star Wheel Barrel Candle "
    "Kettle Lantern Pelican Griffin Unicorn Dolphin Mermaid Rose Ship Plough Boot Thimble"
)
STREETS = _words(
    "Elmgate Millrow Chapelwalk Tannergate Willowbank Bridgefoot Castlegate Orchardway Stationrow Northgate "
    "Southgate Gardenwalk Lanternrow Cobblegate Fountainside Abbeywalk Cherrybank Poplarway Quarryside Saddlerow "
    "Towergate Weavergate Barleyway Canalside Ferrybank Gloverrow Hickoryway Juniperwalk Lindenway Maplegate "
    "Needlerow Oakbank Pearlgate Queensway Riverside Summerhill Thistleway Valleyside Winterbank Yewgate"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

TRADES = _words(
    "baker cooper tailor miller potter barber carpenter chemist clerk cobbler cook dentist doctor farmer fisher "
    "florist gardener glazier grocer hatter joiner judge lawyer librarian locksmith mason nurse painter pilot "
    "plumber porter postman printer roofer sailor sculptor smith surgeon tanner teacher thatcher tiler waiter "
    "watchmaker weaver welder"
)
ANIMALS = _words(
    "bees goats geese ducks rabbits pigeons hens sheep ponies donkeys cats dogs parrots canaries turtles snails "
    "pigs cows llamas ferrets hamsters finches quails swans peacocks newts frogs carp mules owls"
)
DRINKS = _words(
    "tea coffee cider cocoa milk lemonade beer wine mead rum port sherry water buttermilk punch brandy gin stout "
    "juice broth"
)
INSTRUMENTS = _words(
    "fiddle flute drum harp cello trumpet oboe banjo organ piano guitar clarinet lute horn zither accordion bassoon "
    "viola tuba whistle mandolin harmonica"
)
COLLECTIONS = _words(
    "stamps coins shells buttons maps bottles keys clocks feathers postcards spoons masks dolls medals fossils "
    "lamps marbles matchboxes mirrors pipes rings teapots thimbles toys"
)
FOODS = _words(
    "soup pie trout plums rye cheese stew figs cake ham pears noodles rice beans mushrooms oysters pancakes "
    "dumplings cherries olives walnuts sausages porridge cabbage honey"
)
TOWNS = _words(
    "Aldmoor Brisk Carrow Denholm Eskdale Fallow Gorse Hexham Inver Kelso Lorne Mallow Nairn Orford Penrith Rothay "
    "Selkirk Tarbet Ulster Varna Wexley Yarm Zennor Ashdown Bexhill Corby Dunster Epsom Frome Girvan"
)
COLOURS = _words("red blue green yellow white black grey purple orange brown pink silver golden scarlet violet")
GOODS = _words(
    "rope paper soap glass salt tobacco leather linen wool bread candles ink nails paint seeds shoes silk spices "
    "tools wire books clay coal flour"
)
HOURS = _words("one two three four five six seven eight nine ten eleven noon")
ITEMS = _words(
    "ladder lantern kettle carpet saddle bicycle umbrella telescope wardrobe barrel compass hammer candle basket "
    "blanket camera chair coat desk drill globe hat jug knife mattress needlecase oven plough quilt rug sofa stove "
    "suitcase sword table tent trunk vase violin wheel"
)

FILLERS = (
    "It rained a little in the morning.",
    "Nothing else happened.",
    "The bells rang at dawn.",
    "The wind came from the west.",
    "The streets were quiet.",
    "There was fog over the river.",
    "The market was full.",
    "Nobody could say why.",
    "The rest is not known.",
    "It was a cold night.",
    "The fair comes back next year.",
    "Children played by the old well.",
    "The baths are being repaired.",
    "The harvest was good.",
)


def pronoun(person: str) -> str:
    return "she" if person in WOMEN else "he"


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:]
