"""Every paper: its facts, scales, page, row in the README, and the verdict that is recorded of it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from regimen import cli, papers
from regimen.lab.results import bracket, number

ROOT = Path(__file__).parents[2]
SLUGS = papers.available()
RECORDED = sorted(papers.verdicts())


@pytest.mark.parametrize("slug", SLUGS)
def test_facts_read_from_the_file_are_those_of_the_paper(slug: str) -> None:
    facts, paper = papers.facts(slug), papers.load(slug)
    for name in ("slug", "title", "arxiv", "verb", "policy", "claim"):
        assert facts[name] == getattr(paper, name) != ""
    assert facts["slug"] == slug
    assert re.fullmatch(r"\d{4}\.\d{5}", facts["arxiv"])
    verbs = {verb.strip() for verb in facts["verb"].split(",")}
    assert verbs <= {"collect", "judge", "credit", "learn", "adapt"}


@pytest.mark.parametrize("slug", SLUGS)
def test_a_paper_has_its_scales_and_reports_metrics(slug: str) -> None:
    paper = papers.load(slug)
    assert {"quick", "default", "full"} <= paper.scales.keys()
    kinds = {type(scale) for scale in paper.scales.values()}
    assert len(kinds) == 1
    settings = kinds.pop()
    assert dataclasses.is_dataclass(settings)
    assert settings.__dataclass_params__.frozen
    assert paper.metrics
    assert any(claim.judged for claim in paper.claims)
    assert len({arm.title for arm in paper.arms}) == len(paper.arms)
    assert len({claim.text for claim in paper.claims}) == len(paper.claims)


@pytest.mark.parametrize("slug", SLUGS)
def test_a_paper_has_a_page_that_says_how_to_run_it(slug: str) -> None:
    page = (ROOT / "docs" / "papers" / f"{slug}.md").read_text()
    assert f"`{slug}`" in page.splitlines()[0]
    assert papers.facts(slug)["arxiv"] in page
    assert f"regimen run {slug}" in page
    for command in re.findall(rf"regimen run {slug}([^#`\n]*)", page):
        paper = papers.load(slug)
        for scale in re.findall(r"--scale (\S+)", command):
            assert scale in paper.scales
        for names in re.findall(r"--arms (\S+)", command):
            assert set(names.split(",")) <= {arm.name for arm in paper.arms}
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page):
        assert (ROOT / "docs" / "papers" / target).exists(), target


@pytest.mark.parametrize("slug", RECORDED)
def test_the_page_has_the_recorded_verdict_and_its_numbers(slug: str) -> None:
    assert slug in SLUGS
    entry, page = papers.verdicts()[slug], (ROOT / "docs" / "papers" / f"{slug}.md").read_text()
    assert f"**Verdict: {entry['verdict']}**" in page
    assert entry["scale"] in ("default", "full")
    names = {claim.name for claim in papers.load(slug).claims}
    for claim in entry["claims"]:
        assert claim["name"] in names
        if claim["judged"]:
            assert number(claim["mean"]) in page
            assert bracket(claim) in page


def test_the_readme_has_the_table_that_the_command_line_prints() -> None:
    readme = (ROOT / "README.md").read_text()
    found = re.search(r"<!-- papers -->\n(.*?)\n<!-- /papers -->", readme, re.DOTALL)
    assert found, "README.md has no table between <!-- papers --> and <!-- /papers -->"
    printed = CliRunner().invoke(cli.app, ["papers", "--markdown"]).stdout
    assert found[1].strip() == printed.strip(), "put the output of 'regimen papers --markdown' into README.md"


def test_the_results_page_has_the_tables_that_the_command_line_prints() -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    printed = CliRunner().invoke(cli.app, ["papers", "--results"]).stdout
    assert page.endswith(printed), "put the output of 'regimen papers --results' at the end of docs/results.md"
    assert all(entry["spent"] for entry in papers.verdicts().values())


def test_an_unknown_paper_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(papers.UnknownPaper, match="there is no paper 'unipic'; did you mean 'unipic2'"):
        papers.facts("unipic")


class Watched:
    """Settings that take note of what is read."""

    def __init__(self, settings: Any) -> None:
        self.settings, self.read = settings, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self.settings, name)


@pytest.mark.parametrize("slug", SLUGS)
def test_a_kept_start_reads_none_of_the_settings_that_it_is_said_to_ignore(slug: str) -> None:
    paper = papers.load(slug)
    for arm in paper.arms:
        if arm.cached:
            watched = Watched(paper.scales["quick"])
            arm.build(0, watched)
            assert not watched.read & set(arm.ignores), arm.name
