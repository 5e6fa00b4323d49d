"""Reads the pages of the lab's report as a browser would."""

import html.parser


class Parsed(html.parser.HTMLParser):
    """A page's tables (rows of cell texts by caption), its other text, what it refers to, and whether tags balance."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.references, self.ids, self.open, self.text = [], [], [], ""
        self._caption, self._rows = "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.references += [given[name] for name in ("src", "href", "xlink:href", "action") if name in given]
        self.ids += [given["id"]] if "id" in given else []
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self._rows[-1][-1] += data
        if self.open[-2:] == ["caption", "span"]:
            self._caption += data

    def table(self, beginning: str) -> dict[str, list[dict[str, str]]]:
        """First cell -> its rows, as column -> text, of the table whose caption begins so."""
        head, *rows = next(rows for caption, rows in self.tables.items() if caption.startswith(beginning))
        found: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            found.setdefault(row[0], []).append(dict(zip(head, row, strict=True)))
        return found
