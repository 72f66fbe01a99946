"""An HTML page as its elements, for tests of the pages that we write."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """Which elements, addresses and ids a page has, and whether each element is closed."""

    VOID = frozenset({"meta", "path", "use", "rect", "link", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.ids = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.addresses += [value for name, value in attrs if name in ("href", "src", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag
