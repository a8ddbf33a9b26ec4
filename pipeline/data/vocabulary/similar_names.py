"""Categories whose names are alike but not equal: what a person may want to map by hand."""

import re
from collections.abc import Iterator

from pipeline.data.vocabulary.categories import Vocabulary, clean_name

MAX_CANDIDATES = 6


class SimilarNames:
    """Looks for the categories of one vocabulary that a name may mean; nothing here decides."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._by_form: dict[str, dict[int, None]] = {}
        self._by_word: dict[str, dict[int, None]] = {}
        for k, category in enumerate(vocabulary.categories):
            for name in (category.name, *category.aliases):
                for form in forms(name):
                    self._by_form.setdefault(form, {})[k] = None
                for word in bare_name(name).split(" "):
                    self._by_word.setdefault(stem(word), {})[k] = None

    def columns(self, *names: str) -> tuple[int, ...]:
        """At most `MAX_CANDIDATES` columns for a category of these names, the most alike first.

        Those that share a spelling; then what the last word alone names ("car" for "Sports Car");
        where there is neither, names that hold the word ("laptop computer" for "Laptop").
        """
        found: dict[int, None] = {}
        last_words = [stem(bare_name(name).split(" ")[-1]) for name in names]
        for form in (*(form for name in names for form in forms(name)), *last_words):
            found.update(self._by_form.get(form, {}))
        if not found:
            for name in names:
                found.update(self._by_word.get(stem(bare_name(name)), {}))
        return tuple(found)[:MAX_CANDIDATES]


def forms(name: str) -> list[str]:
    """Spellings of a name that mean the same to a reader, the most exact first.

    "Tea pot" and "teapot" have a form in common, and so have "Slippers" and "slipper",
    "Cabinet/shelf" and "shelf", "Other Shoes" and "shoe", "mouse (animal)" and "mouse".
    """
    plain, bare = clean_name(name).casefold(), bare_name(name)
    others = bare.removeprefix("other ")
    return list(dict.fromkeys(filter(None, map(stem, [plain, bare, *_parts(bare), others]))))


def bare_name(name: str) -> str:
    """A cleaned name in small letters, without what stands in parentheses."""
    return " ".join(re.sub(r"\([^)]*\)", " ", clean_name(name).casefold()).split())


def stem(name: str) -> str:
    """Letters and digits alone, with one spelling for singular and plural; no word by itself."""
    text = re.sub(r"[\W_]+", "", name)
    text = re.sub(r"(?<=..)(?<![su])s$", "", text)
    text = re.sub(r"(ss|us|x|z|ch|sh|o)e$", r"\1", text)
    return re.sub(r"ie$", "y", re.sub(r"[fv]e$", "f", text))


def _parts(name: str) -> Iterator[str]:
    """The alternatives between strokes; the last may lend its last word to those before it:
    "cutting/chopping board" is "cutting board" or "chopping board"."""
    parts = [part.strip() for part in name.split("/")]
    if len(parts) > 1:
        yield from parts
        yield from (f"{part} {parts[-1].rpartition(' ')[2]}" for part in parts[:-1])
