"""The closed vocabulary of the testbed: every generated text is made of these words and of LongBench's templates.

Words of one kind are interchangeable, so only the context determines the next word: a model must look up the answer
in it.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    words = tuple(text.split())
    assert len(words) == len(set(words)), "a word is listed twice"
    return words


NAMES = _words(
    """Abel Ada Agnes Alba Alder Alma Amos Anton Arlo Asa Astrid Axel Basil Beatrix Bela Boris Bram Bruno Calla Carmen
    Cedric Celia Clara Clement Cora Cyrus Dagny Dante Daphne Delia Dora Edgar Edith Egon Elias Elsa Emil Enzo Erik
    Esme Ewald Fabian Fay Felix Fergus Flora Frida Gemma Gideon Greta Gustav Hazel Hector Helga Hilda Hugo Ida Igor
    Ines Ivo Jasper Joan Judith Jules Karl Katya Klaus Lars Leona Lidia Linus Lorna Ludo Magda Marek Mavis Milo Mina
    Nadia Nils Nora Odette Olaf Opal Oscar Otto Pavel Petra Quentin Ralf Ramona Rufus Selma Sigrid Tilda Ulric Vera
    Viola Wanda Wilma"""
)
KINDS = _words(
    """amber antique bitter blue bright bronze broken carved cheap clean copper crystal dark dried dusty faded fragile
    frozen gilded glass golden green grey heavy hollow iron ivory large light loud marble narrow orange painted pale
    plain polished purple rare red rough round rusty salted scarlet sharp silver small smooth soft solid square steel
    striped sweet tiny velvet warm white wooden woven yellow"""
)
GOODS = _words(
    """anchors apples arrows baskets bells benches blankets boats books bottles bowls boxes bricks brushes buttons
    candles carpets chairs clocks coats coins combs cups doors drums engines feathers flags flutes gates gloves hammers
    hats hooks jars kettles keys kites knives ladders lamps lenses maps masks mirrors nails needles nets pens pipes
    plates ropes saddles sails scales shields shovels spoons swords tables tiles towels wagons wheels"""
)
ACTIONS = _words(
    """brings carries delivers donates exports gives hands hauls lends mails moves offers passes presents promises rents
    returns sells sends ships shows supplies takes trades"""
)
PLACES = _words(
    """Amiens Basel Bergen Bilbao Bologna Bremen Cadiz Calais Dover Dresden Exeter Faro Galway Gdansk Geneva Genoa
    Ghent Graz Hull Izmir Jena Kiel Krakow Leeds Lille Lima Linz Lisbon Lyon Malmo Metz Milan Namur Nantes Oslo
    Padua Parma Porto Quito Riga Rouen Seville Siena Tallinn Trieste Turin Utrecht Valencia Verona"""
)
CLASSES = _words(
    """Animal Building City Color Currency Disease Event Food Language Mountain Music Plant Religion Sport Vehicle
    Weapon"""
)

# Filler: sentences that state no fact.
OPENERS = _words("Meanwhile Later Afterwards Usually Yesterday Today Sometimes Again")
GROUPS = _words("council committee market harbour office museum village library college hospital station theatre")
FILLER_VERBS = _words("discussed reviewed delayed welcomed noticed debated planned praised ignored described")
FILLER_NOUNS = _words("weather budget schedule festival road bridge garden meeting visit speech election holiday")
FILLER_ENDS = _words("quietly calmly slowly twice briefly together alone carefully")

LEXICON = {
    "names": NAMES,
    "kinds": KINDS,
    "goods": GOODS,
    "actions": ACTIONS,
    "places": PLACES,
    "classes": CLASSES,
    "openers": OPENERS,
    "groups": GROUPS,
    "filler verbs": FILLER_VERBS,
    "filler nouns": FILLER_NOUNS,
    "filler ends": FILLER_ENDS,
}
