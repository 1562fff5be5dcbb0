"""The report holds what the runs left, needs nothing from outside, and a browser draws all of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from scaler.recipe import load_recipe
from scaler.show.report import write_report
from shards.index import ShardIndex
from tests.images import encode_image, make_pixels
from tests.long import only_long
from tests.runs import write_recipe

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "<script>alert('x')</script></SCRIPT> \"'&"


def make_runs(folder: Path, index: ShardIndex) -> list[Path]:
    """A whole run, one with alarms, rejected samples and another method, one that failed, an empty folder."""
    generator = np.random.default_rng(0)
    for name, method, count in (("whole", "simclr", 3000), ("troubled", "dinov2", 400), ("failed", "simclr", 1)):
        run = folder / name
        run.mkdir(parents=True)
        recipe = load_recipe(str(write_recipe(folder / f"{name}.yaml", method, shards=Path(str(index.path)))))
        values = recipe.model_dump(mode="json")
        values["data"] |= {"global_batch_size": 8, "max_bad_fraction": 1.0}
        values["optim"]["lr"] = 0.1 / count
        (run / "recipe.yaml").write_text(yaml.safe_dump(values))
        with (run / "metrics.jsonl").open("w") as file:
            for step in range(1, count + 1):
                row: dict[str, Any] = {"step": step, "images": 8 * step, "epoch": step / 4, "lr": 0.1 / step}
                row |= {"loss": 3 + float(generator.random()), "grad_norm": 1.0, "images_per_second": 100.0}
                row |= {"data_wait": 0.01, "memory_gib": 1.0, "seconds/step": 0.5, "rejected": 2}
                if step == 1234:
                    row["loss"] = 77.0
                if step == 300:
                    row["loss"] = None
                if step % 100 == 0:
                    row["val/top1"] = step / 5000
                if method == "dinov2":
                    row["seconds/read"] = 0.1 + 0.01 * float(generator.random())
                if method == "dinov2" and 100 <= step < 150:
                    row["alarm/guessing"] = 1.0
                file.write(json.dumps(row) + "\n")
    record = {"step": 5, "id": 3, "key": NASTY, "shard": "a-000000.tar", "reason": "cut off", "replacement_key": "b"}
    (folder / "troubled" / "rejected.jsonl").write_text(2 * (json.dumps(record) + "\n"))
    (folder / "troubled" / "run.json").write_text(json.dumps({"strategy": "ddp", "environment": {"host": NASTY}}))
    (folder / "whole" / "exit.json").write_text('{"reason": "done"}')
    (folder / "whole" / "best.json").write_text('{"step": 3000, "val/top1": 0.6}')
    (folder / "whole" / "evaluations").mkdir()
    evaluation = {"evaluation": "knn", "step": 3000, "top1": 0.625, "k": 20, "date": "2026-11-21", "table": []}
    (folder / "whole" / "evaluations" / "knn.json").write_text(json.dumps(evaluation))
    (folder / "failed" / "exit.json").write_text('{"reason": "error", "error": "CUDA out of memory"}')
    (folder / "empty").mkdir()
    return [folder / name for name in ("whole", "troubled", "failed", "empty")]


class Page(HTMLParser):
    """What a page consists of: (tag, attributes) in order, its texts, and elements that were never closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("p", "li", "option") or self.open[-1] in ("option", "p", "li"):
            while self.open[-1] in ("option", "p", "li") and self.open[-1] != tag:
                self.open.pop()
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def report(index: ShardIndex, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    picture = folder / "own picture.jpg"
    picture.write_bytes(encode_image(make_pixels(80, 60, seed=1)))
    write_report(folder / "report.html", make_runs(folder, index), samples=2, pictures=[picture])
    return folder / "report.html"


def test_the_page_holds_everything_and_refers_to_nothing(report: Path) -> None:
    text = report.read_text()
    page = Page(text)
    assert page.open == []
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(links) == 4 and all(value and value.startswith("data:image/") for value in links)
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", text)
    assert "default-src 'none'" in text and NASTY not in text and text.count("<script") == 2
    words = " ".join(page.texts)
    for expected in ("failed: CUDA out of memory", "no run: it holds neither", "done", "Losses of different methods",
                     "optim.lr", "3,000 of 20", "1 samples, met 2 times", "a-000000.tar", "top1 0.6 (step 3000)",
                     "top1 0.625", "k 20, date", "own picture.jpg", "No picture of its batches"):  # fmt: skip
        assert expected in words, expected


def test_the_curves_are_those_of_the_runs(report: Path) -> None:
    found = re.search(r'id="data">(.*?)</script>', report.read_text(), re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert [run["name"] for run in data["runs"]] == ["whole", "troubled", "failed", "empty"]
    panels = {panel["name"]: panel for panel in data["panels"]}
    logged = {"loss", "lr", "grad_norm", "images_per_second", "data_wait", "memory_gib", "seconds/step", "rejected"}
    assert set(panels) == logged | {"val/top1", "alarms", "seconds/read"}
    whole, troubled, failed = panels["loss"]["series"]
    assert (whole["run"], troubled["run"], failed["run"]) == (0, 1, 2)
    assert len(whole["step"]) < 2000 and whole["value"][whole["step"].index(1234)] == 77.0
    assert whole["bad"] == troubled["bad"] == [300] and whole["value"][whole["step"].index(300)] is None
    assert len(troubled["step"]) == 400 and failed["step"] == [1]
    assert panels["alarms"]["strips"] == [{"name": "guessing", "run": 1, "spans": [[100, 149]]}]
    assert data["runs"][0]["axis"]["images"][-1] == 24000


def test_wrong_use_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no picture")
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=r"x\.png is no PNG, JPEG or WebP"):
        write_report(tmp_path / "r.html", [tmp_path / "run"], pictures=[tmp_path / "x.png"])
    with pytest.raises(ValueError, match=r"y\.png cannot be read"):
        write_report(tmp_path / "r.html", [tmp_path / "run"], pictures=[tmp_path / "y.png"])
    with pytest.raises(ValueError, match="1 to 8 runs, not 9"):
        write_report(tmp_path / "r.html", [tmp_path / "run"] * 9)
    write_report(tmp_path / "r.html", [tmp_path / "run"], samples=0)
    assert "None of these runs has logged a step yet" in (tmp_path / "r.html").read_text()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here to draw the page")
@pytest.mark.parametrize("dark", [False, pytest.param(True, marks=only_long)])
def test_a_browser_draws_every_panel(report: Path, dark: bool, tmp_path: Path) -> None:
    """Each plot and picture of the page, found by where the browser put it, has curves in it and is not one colour."""
    where = """<script>document.querySelectorAll("details:has(.plot)").forEach((d) => { d.open = true; });
      setTimeout(() => document.querySelectorAll(".plot, .pictures img").forEach((node) => {
        const box = node.getBoundingClientRect();
        node.setAttribute("data-box", [box.left, box.top, box.right, box.bottom].map(Math.round).join(" "));
      }), 500);</script></body>"""
    (tmp_path / "page.html").write_text(report.read_text().replace("</body>", where))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom",
               "--window-size=1300,6000", "--virtual-time-budget=2000", f"--user-data-dir={tmp_path / 'profile'}",
               f"--screenshot={tmp_path / 'page.png'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
               f"file://{tmp_path / 'page.html'}"]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    assert (pixels[2, 2].mean() < 60) == dark
    boxes = [[int(x) for x in found.split()] for found in re.findall(r'data-box="([^"]*)"', dom)]
    assert len(boxes) == 11 + 4
    for left, top, right, bottom in boxes:
        inside = pixels[top:bottom, left:right]
        assert inside.shape[0] > 40 and inside.shape[1] > 50
        coloured = np.ptp(inside, axis=-1) > 60  # lines of runs and pictures; axes and words are grey
        assert coloured.sum() > 100, (left, top)
    plots = re.findall(r'<div class="plot".*?</figure>', dom, re.DOTALL)
    assert len(plots) == 11 and not any("nothing in this stretch" in plot for plot in plots)
    assert all(re.search(r'<path [^>]*d="M[^"]*L|<rect|<circle', plot) for plot in plots)
