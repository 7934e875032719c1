"""Pages of the report, taken apart."""

import html.parser

VOID = {"meta", "link", "img", "source", "br", "hr", "input", "line", "circle", "path"}


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and collects texts and addresses."""

    def __init__(self, source):
        super().__init__()
        self.open_tags, self.texts, self.addresses, self.scripts = [], [], [], []
        self.feed(source)
        self.close()
        assert self.open_tags == []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                self.addresses.append(value)
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if self.open_tags and self.open_tags[-1] in ("script", "style"):
            self.scripts.append(data)
        elif data.strip():
            self.texts.append(data.strip())

    @property
    def text(self):
        return "\n".join(self.texts)
