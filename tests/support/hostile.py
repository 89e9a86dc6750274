"""Names as a hostile author would write them into a checkpoint, a board or a store, for every kind of output."""

from __future__ import annotations

from html.parser import HTMLParser

HOSTILE_NAMES = (
    "[/x]",
    "[bold red]x[/]",
    "[link=http://evil.example]click[/link]",
    "\x1b]0;owned\x07\x1b[2J\x1b[31mred",
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    '=HYPERLINK("http://evil.example","x")',
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1)",
    "\t=1+1",
    "| a | b |",
    "a\r\n\r\n# heading",
    "![x](http://evil.example/x.png)",
    "[x](javascript:alert(1))",
    "`` ` ``",
    "http://evil.example www.evil.example a@evil.example",
    "{{ 7 * 7 }}{% for x in y %}",
    "\u202egnp.exe",
    "\ud800",
    "\x00\x08\x1f\ufffe\uffff",
    "\\",
    "&lt;b&gt;",
    "a" * 6000,
)


class PageText(HTMLParser):
    """The text of a page, without that of scripts, and its tags in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.texts = list[str](), list[str]()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)
