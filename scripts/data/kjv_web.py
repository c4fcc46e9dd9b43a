"""Aligned King James / World English pairs from two mod2imp exports; the text half of kjv-web.sh.

usage: kjv_web.py KJV.imp WEB.imp OUT_DIR WINDOW      (WINDOW 0: one pair per chapter)
"""
import re
import statistics
import sys
import zlib

SPLITS = "train", "valid", "test"
JOIN = "\n"  # between the verses of a pair


def split_of(book, chapter):
    """About 90/5/5, from the chapter's name alone: the same in every mode, for ever."""
    bucket = zlib.crc32(f"{book} {chapter}".encode()) % 20
    return "valid" if bucket == 0 else "test" if bucket == 1 else "train"


def read_entries(path):
    """{(book, chapter, verse): raw OSIS markup}; chapter and verse 0 are introductions, left out."""
    verses = {}
    with open(path, encoding="utf-8") as file:
        entries = re.split(r"^\$\$\$", file.read(), flags=re.M)[1:]
    for entry in entries:
        key, _, raw = entry.partition("\n")
        match = re.fullmatch(r"(.+) (\d+):(\d+)", key)  # else the heading of a module or testament
        if match and int(match[2]) and int(match[3]):
            verses[match[1], int(match[2]), int(match[3])] = raw
    return verses


def plain(raw):
    """Readable text of one verse. Done here, not by mod2imp -s: that glues words together where a note stood."""
    text = re.sub(r"<(title|speaker)\b[^>]*>.*?</\1>", " ", raw, flags=re.S)  # headings, psalm titles, colophons
    text = re.sub(r"<note\b[^>]*>.*?</note>", "\0", text, flags=re.S)
    text = re.sub(r"<(?:l|lg|lb|div|chapter|milestone)\b[^>]*>", " ", text)  # line and paragraph breaks
    text = re.sub(r"<[^>]*>", "", text)  # Strong's numbers, red letters, added words, ...: keep what they enclose
    text = re.sub(r"\0+(?=[\w“‘(\[])", " ", text).replace("\0", "")  # where a note was, a word may follow directly
    text = re.sub(r"\\[a-z]+\*? ?", "", text)  # "\nd LORD": source markup that survived in the KJV package
    text = re.sub(r"[\s¶]+", " ", text).strip()
    text = re.sub(r"([.,;:!?]”)(?=\w)", r"\1 ", text)  # "he said,”Come" at the end of red letters
    return re.sub(r" (?=[,.;:?!”])", "", text)  # "coins ?"


def verse_text(raw):
    """(text, whether something was cut off). After the chapter's end come colophons and the glossary; a second
    verse start means that text with numbers unknown to the module was appended to this verse (WEB's Romans
    14:24-26, which are 16:25-27 in the KJV): aligned with nothing, so cut."""
    raw = re.split(r"<chapter eID=", raw)[0]
    parts = re.split(r'(?=<div [^>]*subType="x-preverse" sID=)', raw)
    texts = [text for text in map(plain, parts) if text]
    return (texts[0] if texts else "", len(texts) > 1)


def chapters_of(verses):
    """[(name, verses)] of consecutive verses of one chapter."""
    groups = {}
    for verse in verses:
        (book, chapter, _), _, _ = verse
        groups.setdefault(f"{book} {chapter}", []).append(verse)
    return list(groups.items())


def windows_of(verses, limit):
    """[(name, verses)] of consecutive verses, as many as keep both sides within limit bytes."""
    groups, used = [], [0, 0]
    for verse in verses:
        sizes = [len((JOIN + text).encode()) for text in verse[1:]]
        # the first verse of a pair has no JOIN before it
        if not groups or max(u + s for u, s in zip(used, sizes)) - len(JOIN) > limit:
            groups.append([])
            used = [0, 0]
        groups[-1].append(verse)
        used = [u + s for u, s in zip(used, sizes)]
    label = "{0[0]} {0[1]}:{0[2]}".format
    return [(f"{label(group[0][0])}-{label(group[-1][0])}", group) for group in groups]


def escape(text):
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n")


def main(kjv_path, web_path, out_dir, window):
    kjv, web = read_entries(kjv_path), read_entries(web_path)
    books = list(dict.fromkeys(book for book, _, _ in kjv))  # the KJV module holds the 66 books and nothing else
    if len(books) != 66 or any(book not in {key[0] for key in web} for book in books):
        sys.exit(f"kjv-web: expected the same 66 books in both modules, found {len(books)} in the King James one.")

    kept, cut, dropped = [], [], {"KJV": [], "WEB": []}
    for key in kjv | {key: "" for key in web if key[0] in books and key not in kjv}:
        source, cut_source = verse_text(kjv.get(key, ""))
        target, cut_target = verse_text(web.get(key, ""))
        if cut_source or cut_target:
            cut.append(key)
        if source and target:
            kept.append((key, source, target))
        elif source or target:
            dropped["WEB" if source else "KJV"].append(key)

    def listed(keys):
        return f"{len(keys)}" + (" (" + ", ".join(f"{b} {c}:{v}" for b, c, v in keys) + ")" if keys else "")

    chapters = {key[:2] for key, _, _ in kept}
    print(f"kept: {len({book for book, _ in chapters})} books, {len(chapters)} chapters, {len(kept)} verses")
    print(f"dropped, no text in the WEB: {listed(dropped['WEB'])}")
    print(f"dropped, no text in the KJV: {listed(dropped['KJV'])}")
    print(f"kept, but rid of text from other verse numbers: {listed(cut)}")

    print(f"{'split':6}{'pairs':>7}{'verses':>8}   {'KJV bytes: median':>18}{'max':>9}{'sum':>10}"
          f"   {'WEB bytes: median':>18}{'max':>9}{'sum':>10}")
    totals = [0, 0, [], []]

    def report(name, pairs, verses, *sides):
        print(f"{name:6}{pairs:7}{verses:8}" + "".join(
            f"   {round(statistics.median(side)):18}{max(side):9}{sum(side):10}" for side in sides))

    for split in SPLITS:
        verses = [verse for verse in kept if split_of(*verse[0][:2]) == split]
        pairs = windows_of(verses, window) if window else chapters_of(verses)
        sides = [], []
        with open(f"{out_dir}/{split}.tsv", "w", encoding="utf-8", newline="") as file:
            for name, group in pairs:
                texts = [JOIN.join(verse[side] for verse in group) for side in (1, 2)]
                for side, text in zip(sides, texts):
                    side.append(len(text.encode()))
                file.write("\t".join([name, *map(escape, texts)]) + "\n")
        report(split, len(pairs), len(verses), *sides)
        totals = [totals[0] + len(pairs), totals[1] + len(verses), totals[2] + sides[0], totals[3] + sides[1]]
    report("all", *totals)


main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
