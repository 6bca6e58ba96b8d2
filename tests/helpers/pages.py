"""What the tests of the page share: a profile with something of everything, and a reader."""

from dataclasses import replace
from html.parser import HTMLParser

import torch
from torch import nn

import fastplastic
from fastplastic.cli.page import Origin, page_view
from fastplastic.cli.report import report_of
from helpers import Net

_VOID = {"meta", "link", "input", "path", "rect", "wbr"}
ORIGIN = Origin("fastplastic profile net", (("fastplastic", "1.2.3"),), "ab12")


class Element:
    """One element of a page: its tag, attributes, elements inside and all of its text."""

    def __init__(self, tag, attributes):
        self.tag, self.attributes = tag, dict(attributes)
        self.inside, self.pieces = [], []

    def all(self, tag, **attributes):
        """Return all elements inside with this tag and these attributes."""
        found = [self] if self.fits(tag, attributes) else []
        return found + [x for child in self.inside for x in child.all(tag, **attributes)]

    def one(self, tag, **attributes):
        """Return the only element inside with this tag and these attributes."""
        (found,) = self.all(tag, **attributes)
        return found

    def fits(self, tag, attributes):
        """Tell whether it has this tag, any for "*", and these attributes."""
        return tag in (self.tag, "*") and attributes.items() <= self.attributes.items()

    @property
    def text(self):
        """All text, with single spaces."""
        return " ".join("".join(self.raw()).split())

    def raw(self):
        """Yield the text as it stands."""
        for piece in self.pieces:
            yield from [piece] if isinstance(piece, str) else piece.raw()


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open = [Element("", {})]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, attrs)
        self.open[-1].inside.append(element)
        self.open[-1].pieces.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        if tag not in _VOID:
            assert self.open.pop().tag == tag, f"</{tag}> closes another"

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_data(self, data):
        self.open[-1].pieces.append(data)


def parsed(text):
    """Return the page as elements; each that is opened has to be closed."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert len(reader.open) == 1
    return reader.open[0]


def small_profile():
    """Return a profile with dead units, a stream, units made together, and a layer not measured."""
    torch.manual_seed(0)

    def forward(own, x):
        h = own.stem(x).relu()
        h = h + own.branch(own.first(h).relu())
        h = own.deep(own.wide(h).relu()).relu()
        return own.head(own.narrow(h).mean((2, 3)))

    model = Net(
        forward, stem=nn.Conv2d(3, 8, 3), first=nn.Conv2d(8, 12, 1), branch=nn.Conv2d(12, 8, 1),
        wide=nn.Conv2d(8, 16, 1), deep=nn.Conv2d(16, 16, 3, groups=16), narrow=nn.Conv2d(16, 6, 1),
        head=nn.Linear(6, 4), never=nn.Linear(2, 2),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model.first.bias[:3] = -1e3
        model.wide.bias[:5] = -1e3
    batches = [(torch.randn(4, 3, 8, 8), torch.arange(4)) for _ in range(2)]
    return fastplastic.profile(model, batches)


def view_of(profile, title="net", origin=ORIGIN, **more):
    """Return the view of a profile's page."""
    return page_view(profile, title, report_of(profile, (("model", title),)), origin, **more)


def renamed(profile, name):
    """Return the profile with another name for its second layer."""
    first, second, *others = profile.layers
    second = replace(second, wiring=replace(second.wiring, name=name, reasons={name: 3}))
    return replace(profile, layers=(first, second, *others), notes=(name,))
