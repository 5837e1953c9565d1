"""The status page in a real browser: by the keyboard alone, in both color schemes, on a narrow screen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from fastapi import FastAPI

from cluster.config import SluiceConfig
from cluster.protos import worker_pb2 as pb
from deploy.api_keys import ApiKeys
from deploy.api_service import ApiService
from deploy.status_page import add_status_page
from helm.chromium import chromium
from tests.support.api import complete, front_door
from tests.support.browser import Page, page
from tests.support.routing import Stage
from tests.support.scripted_worker import FOREVER

pytestmark = [
    pytest.mark.full,
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="needs Chromium"),
]

CONFIG = SluiceConfig.model_validate({"model": {"path": "/models/tiny"}, "name": "chat"})
KEY = "a-key-of-16-chars-or-more"
EVIL = '<img src=x onerror="window.seen=1">'
FIGURES = "!document.getElementById('figures').hidden && document.querySelectorAll('#routes tr').length > 1"
FOCUS = "document.activeElement.id || document.activeElement.className"
# Text that stands out less from what is behind it than WCAG 2.2 AA asks: 4.5 : 1, 3 : 1 where it is large.
_FAINT = """
(() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = color => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = color; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((all, v, i) => all + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const color = rgba(getComputedStyle(element).backgroundColor);
      if (color[3] === 255) return color;
    }
    return rgba("Canvas");
  };
  const faint = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.textContent.trim() || !element.getClientRects().length) continue;
    const style = getComputedStyle(element), size = parseFloat(style.fontSize);
    const pair = [light(rgba(style.color)), light(behind(element))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    seen += 1;
    if (ratio < (size >= 24 || size >= 18.66 && style.fontWeight >= 700 ? 3 : 4.5))
      faint.push(element.textContent.slice(0, 30) + ": " + ratio.toFixed(2));
  }
  return [seen, faint];
})()
"""


def add(app: FastAPI, service: ApiService) -> None:
    add_status_page(app, CONFIG, service.router, "ingress-0", list)


@pytest.fixture(scope="module")
def shown() -> Iterator[Page]:
    with page() as opened:
        yield opened


@pytest.fixture
def stage() -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(stack)


def tab_to(shown: Page, name: str) -> None:
    """However many steps it takes."""
    for _ in range(20):
        shown.press("Tab")
        if shown.js(FOCUS) == name:
            return
    pytest.fail(f"Tab does not come to {name}")


def test_figures_by_keyboard_in_both_schemes_and_on_a_narrow_screen(stage: Stage, shown: Page) -> None:
    """A worker's name that would be markup is text."""
    prefill, decode = stage.prefill(EVIL), stage.decode("decode-0", FOREVER)
    groups = [pb.GroupLoad(name="self", num_blocks=10, free=4, filling=1, ready=2, cached=2, quarantined=1)]
    pair = pb.PairReport(source_incarnation=prefill.incarnation, warm=True, transport="nixl", bytes_per_s=2e9)
    decode.load = pb.LoadReport(num_running=3, groups=groups, pairs=[pair])
    with front_door(None, policy="kv_aware", local_prefill="fallback", add=add) as door:
        door.connect(prefill, decode)
        for _ in range(3):
            complete(door).raise_for_status()
        shown.look()
        shown.open(door.url)
        shown.until(FIGURES, "the figures are there")
        shown.until(f"document.getElementById('workers').textContent.includes({EVIL!r})", "the name is there as text")
        assert shown.js("[document.images.length, window.seen]") in ([0, None], [0])

        tab_to(shown, "pause")
        assert shown.js("getComputedStyle(document.activeElement).outlineStyle") == "solid", "one sees where one is"
        shown.press(" ")
        assert shown.js("document.activeElement.getAttribute('aria-pressed')") == "true"
        shown.press("Enter")
        assert shown.js("document.activeElement.getAttribute('aria-pressed')") == "false"
        tab_to(shown, "why")
        shown.press("Enter")
        shown.until("document.querySelector('#routes .detail table') !== null", "the ways that there were")
        shown.until(f"lastAt > {shown.js('lastAt')}", "the page asked again")
        assert shown.js(FOCUS) == "why" and shown.js("document.activeElement.getAttribute('aria-expanded')") == "true"

        backgrounds: set[str] = set()
        for scheme in ("light", "dark"):
            for width in (1280, 390):
                shown.look(scheme=scheme, width=width)
                shown.until(f"matchMedia('(prefers-color-scheme: {scheme})').matches && innerWidth === {width}", "so")
                num_texts, faint = shown.js(_FAINT)
                assert num_texts > 40 and faint == [], (scheme, width)
                over = shown.js("document.documentElement.scrollWidth - document.documentElement.clientWidth")
                assert over <= 0, "one need not scroll sideways"
            backgrounds.add(shown.js("getComputedStyle(document.body).backgroundColor"))
        assert len(backgrounds) == 2, "dark is dark"
    assert shown.complaints == []


def test_a_key_is_asked_for_and_taken_by_keyboard(stage: Stage, shown: Page) -> None:
    """The page and its server are others than above; what the browser says of a refused question is no fault."""
    with front_door(None, api_keys=ApiKeys.parse([f"ann {KEY}"], "here", "here"), add=add) as door:
        door.connect(stage.decode("decode-0", FOREVER))
        shown.look(scheme="dark")
        shown.open(door.url)
        shown.until("!document.getElementById('login').hidden", "it asks")
        assert shown.js(FOCUS) == "key", "one can write at once"
        shown.write("another-key")
        shown.press("Enter")
        shown.until("document.getElementById('refused').textContent !== ''", "it is refused")
        assert shown.js(_FAINT)[1] == []
        shown.write(KEY)
        shown.press("Enter")
        shown.until("!document.getElementById('figures').hidden", "the figures are there")
        assert shown.js("document.getElementById('login').hidden && document.getElementById('key').value === ''")
        assert shown.js("document.cookie + JSON.stringify({...localStorage})") == "{}", "the key stays in this tab"
