"""Categories that captions name: labels that nobody gave, as Detic makes them of CC3M."""

import re
from collections.abc import Sequence

from pipeline.data.sample import UNLABELLED
from pipeline.data.sources.instances import read_categories, read_json
from pipeline.data.sources.record import RecordSet
from pipeline.data.vocabulary.categories import Category, Vocabulary, clean_name
from pipeline.errors import DataError
from pipeline.recipe import Source

# Words, and any other sign but those inside and between the words of a name: a phrase does not
# reach over a comma or a full stop. CC12M writes <PERSON> where a name stood, in view or not.
_TOKEN = re.compile(r"<\w+>|[^\W_]+|[^\w\s'\u2019-]")
_WORD = re.compile(r"[^\W_]+")
_IRREGULAR = {
    "child": "children",
    "foot": "feet",
    "goose": "geese",
    "mouse": "mice",
    "ox": "oxen",
    "person": "people",
    "tooth": "teeth",
}


class CategoryFinder:
    """Finds the categories of a vocabulary in captions, by their names and aliases.

    A name is found as whole words, in lower case; underscores, hyphens and spaces are the same, a
    qualifier in parentheses is not looked for, and a slash separates alternatives
    (`Handbag/Satchel`). Its last word may be a plural (s, es, ies, ves, men, and seven irregular
    ones), unless that is a name of its own: "glasses" are LVIS's spectacles. Of names that begin at
    one word the longest counts, and its words count once: a hot dog is no dog. A name that several
    categories have gives all of them, as in Detic (Zhou et al. 2022, whose tags these are but for
    the plurals and the hot dogs).
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        stated: dict[str, set[int]] = {}
        for category in vocabulary.categories:
            for phrase in _phrases(category):
                stated.setdefault(phrase, set()).add(category.id)
        plural: dict[str, set[int]] = {}
        for phrase, ids in stated.items():
            for form in _plurals(phrase):
                plural.setdefault(form, set()).update(ids)
        # What is a name of its own is no plural of another.
        self._ids = {phrase: tuple(sorted(ids)) for phrase, ids in {**plural, **stated}.items()}
        self._longest: dict[str, int] = {}
        for phrase in self._ids:
            first, *rest = phrase.split(" ")
            self._longest[first] = max(self._longest.get(first, 0), 1 + len(rest))

    def find(self, caption: str) -> list[int]:
        """Category ids that the caption names, ascending."""
        words = _TOKEN.findall(caption.lower())
        found: set[int] = set()
        i = 0
        while i < len(words):
            step = 1
            for length in range(self._longest.get(words[i], 0), 0, -1):
                ids = self._ids.get(" ".join(words[i : i + length]))
                if ids is not None:
                    found.update(ids)
                    step = length
                    break
            i += step
        return sorted(found)


def read_finder(source: Source, root: str) -> CategoryFinder | None:
    """The finder for `files.classes` of a source that has and uses labels; None otherwise.

    The file is a json of LVIS or COCO, a list of its categories alone, or a vocabulary of ours.
    """
    if source.files.classes is None or not source.use_labels:
        return None
    url, tree = read_json(source, root, "files.classes", source.files.classes)
    if isinstance(tree, list) and tree and isinstance(tree[0], dict) and "aliases" in tree[0]:
        try:
            vocabulary = Vocabulary.from_json(tree)
        except DataError as error:
            raise DataError(f"{url}: {error}") from None
    else:
        vocabulary = read_categories({"categories": tree} if isinstance(tree, list) else tree, url)
    if not vocabulary.num_categories:
        raise DataError(f"{url}: has no categories to look for in captions")
    return CategoryFinder(vocabulary)


def label_captions(
    captions: Sequence[str], finder: CategoryFinder | None, record_set: RecordSet
) -> list[list[int]] | int:
    """The category ids of each caption, or `UNLABELLED` for all without a finder.

    A caption that names none stands `UNLABELLED`, and is counted.
    """
    if finder is None:
        return UNLABELLED
    labels = [finder.find(caption) for caption in captions]
    for position, (caption, ids) in enumerate(zip(captions, labels, strict=True)):
        if not ids:
            record_set.drop("caption that names no category, kept without a label", caption)
            labels[position] = [UNLABELLED]
    return labels


def _phrases(category: Category) -> set[str]:
    names = (category.name, *category.aliases)
    parts = [part for name in names for part in clean_name(name).split("(")[0].split("/")]
    return {" ".join(_WORD.findall(part.lower())) for part in parts} - {""}


def _plurals(phrase: str) -> list[str]:
    head, space, word = phrase.rpartition(" ")
    forms = [f"{word}s"]
    if word in _IRREGULAR:
        forms = [_IRREGULAR[word]]
    elif word.endswith("man"):
        forms = [f"{word[:-2]}en"]
    elif word.endswith(("s", "x", "z", "ch", "sh")):
        forms = [f"{word}es"]
    elif word.endswith("o"):
        forms.append(f"{word}es")
    elif re.search("[^aeiou]y$", word):
        forms = [f"{word[:-1]}ies"]
    elif word.endswith("fe"):
        forms.append(f"{word[:-2]}ves")
    elif word.endswith("f"):
        forms.append(f"{word[:-1]}ves")
    return [f"{head}{space}{form}" for form in forms]
