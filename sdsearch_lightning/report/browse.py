"""`sdsearch browse`: the rollouts of a run in a terminal, with the numbers and the choices of report.html."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from rich.text import Text

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.report.cells import (
    Measure,
    Place,
    entry,
    group_map,
    left_out,
    measures,
    name_of,
    places,
    transcript,
)
from sdsearch_lightning.report.example import harmless, printable
from sdsearch_lightning.report.html import PHASES
from sdsearch_lightning.report.rollouts import Rollouts, read_rollouts
from sdsearch_lightning.report.views import View, opening

try:
    from textual.app import App, ComposeResult
    from textual.binding import Binding
    from textual.containers import Horizontal, Vertical, VerticalScroll
    from textual.widgets import Footer, Input, OptionList, Static
except ImportError as error:
    raise ConfigError(
        f'sdsearch browse needs Textual ({error}). Install it: pip install "sdsearch-lightning[browse]"'
    ) from error

BUDGET = 64_000_000
"""Bytes of the groups that are held, as JSON."""
_T = TypeVar("_T")
LARGE = 100_000_000
"""Bytes of files whose reading takes so long that it is announced."""
OUTCOMES = ("all", "mixed", "right", "wrong")


class RolloutBrowser(App[None]):
    """A list of groups on the left, the chosen one on the right.

    Args:
        name: of the run.
        rollouts: what is shown; some group.
    """

    CSS = """
    #left { width: 38%; max-width: 60; } #right { padding: 0 1; } #filters { padding: 0 1; height: auto; }
    #words { display: none; } #words.on { display: block; }
    OptionList { border: none; height: 1fr; text-wrap: nowrap; text-overflow: ellipsis; }
    #about, #map { height: auto; margin-bottom: 1; } #rollout { height: auto; }
    """
    ENABLE_COMMAND_PALETTE = False
    BINDINGS = [
        Binding("left", "token(-1)", "token", priority=True, key_display="← →"),
        Binding("right", "token(1)", priority=True, show=False),
        *(Binding(str(digit), f"sibling({digit - 1})", "sibling", digit == 1, "1-9") for digit in range(1, 10)),
        Binding("left_square_bracket", "step(-1)", "step", key_display="[ ]"),
        Binding("right_square_bracket", "step(1)", show=False),
        Binding("f", "outcome", "outcome"),
        Binding("p", "phase", "phase"),
        Binding("m", "measure", "number"),
        Binding("b", "block", "block"),
        Binding("w", "whole", "whole texts"),
        Binding("slash", "words", "search", key_display="/"),
        Binding("escape", "leave", show=False),
        Binding("q", "quit", "quit"),
    ]

    def __init__(self, name: str, rollouts: Rollouts) -> None:
        super().__init__()
        self.title = name
        self.groups = list(rollouts.groups)
        self.left_out = left_out([(part.shown, part.groups) for part in rollouts.left_out])
        self.phases = list(dict.fromkeys(group["phase"] for group in self.groups))
        self.group: View | None = self.groups[opening(self.groups)]
        self.phase: str = self.group["phase"]
        self.step: int | None = self.group["step"]
        self.outcome = "all"
        self.listed: list[View] = []
        self.sibling = 0
        self.token: Place | None = None
        self.measure: Measure | None = None
        self.shows_block = self.shows_whole = False

    def compose(self) -> ComposeResult:
        with Horizontal():
            with Vertical(id="left"):
                yield Static(id="filters")
                yield Input(id="words", placeholder="words of the question, Enter")
                yield OptionList(id="groups")
            with VerticalScroll(id="right"):
                yield Static(id="about")
                yield Static(id="map")
                yield Static(id="rollout")
        yield Footer()

    def on_mount(self) -> None:
        self._list()
        self.query_one(OptionList).focus()

    def on_resize(self) -> None:
        self.call_after_refresh(self._show)  # the map fits itself to the width that there is then

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        if event.option_index < len(self.listed):
            if self.group is not (group := self.listed[event.option_index]):
                self.group, self.sibling, self.token = group, 0, None
            self._show()

    def on_input_changed(self) -> None:
        self._list()

    def on_input_submitted(self) -> None:
        self.query_one(OptionList).focus()

    def action_token(self, by: int) -> None:
        """Goes to the next token of a query, or the one before."""
        words = self.query_one(Input)
        if words.has_focus:
            words.cursor_position += by
            return
        every = places(self.group["rollouts"][self.sibling]) if self.group is not None else []
        if every:
            start = -1 if by > 0 else len(every)
            at = every.index(self.token) if self.token in every else start
            self.token = every[min(len(every) - 1, max(0, at + by))]
            self._show()

    def action_sibling(self, index: int) -> None:
        """Shows another rollout of the group."""
        if self.group is not None and index < len(self.group["rollouts"]):
            self.sibling, self.token = index, None
            self._show()

    def action_step(self, by: int) -> None:
        """Goes to the next step or the one before; before the first stand all steps."""
        every: list[int | None] = [None, *self._steps()]
        self.step = every[min(len(every) - 1, max(0, every.index(self.step) + by))]
        self._list()

    def action_phase(self) -> None:
        """Goes to the next phase, at its last step."""
        self.phase = _next(self.phases, self.phase)
        self.step = self._steps()[-1]
        self._list()

    def action_outcome(self) -> None:
        """Lists groups of the next outcome."""
        self.outcome = _next(list(OUTCOMES), self.outcome)
        self._list()

    def action_measure(self) -> None:
        """Shows the next number of each query."""
        if self.group is not None and (found := measures(self.group)):
            self.measure = _next(found, self.measure if self.measure in found else found[0])
            self._show()

    def action_block(self) -> None:
        """Shows or hides what the teacher read."""
        self.shows_block = not self.shows_block
        self._show()

    def action_whole(self) -> None:
        """Shows long texts whole, or their beginnings."""
        self.shows_whole = not self.shows_whole
        self._show()

    def action_words(self) -> None:
        """Asks for words of the question."""
        words = self.query_one(Input)
        words.add_class("on")
        words.focus()

    def action_leave(self) -> None:
        """Leaves the words, or the token."""
        words = self.query_one(Input)
        if words.has_class("on"):
            words.value = ""
            words.remove_class("on")
            self.query_one(OptionList).focus()
        elif self.token is not None:
            self.token = None
            self._show()

    def _steps(self) -> list[int]:
        return list(dict.fromkeys(group["step"] for group in self.groups if group["phase"] == self.phase))

    def _list(self) -> None:
        """Fills the list anew; the group that was shown stays if it is still in it."""
        words = self.query_one(Input).value.lower()
        found = [
            group
            for group in self.groups
            if group["phase"] == self.phase
            and self.step in (None, group["step"])
            and any(words in text.lower() for text in (group["question"], *group["gold"]))
        ]
        self.listed = [group for group in found if self.outcome in ("all", group["outcome"])]
        filters = Text().append(self.title or "", "bold").append(self.left_out, "dim")
        filters.append(f"\n{PHASES.get(self.phase, self.phase)}, ")
        filters.append("all steps" if self.step is None else f"step {self.step}")
        filters.append(f"\n{self.outcome} groups: {len(self.listed)} of {len(found)}")
        self.query_one("#filters", Static).update(filters)
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options([entry(group, with_step=self.step is None) for group in self.listed])
        shown = self.listed.index(self.group) if self.group in self.listed else 0
        if self.listed:
            options.highlighted = shown
        else:
            self.group = None
            self._show()

    def _show(self) -> None:
        """Draws the right side anew."""
        about, board, shown = (self.query_one(name, Static) for name in ("#about", "#map", "#rollout"))
        if self.group is None:
            about.update(Text("No group is like that: [ ] step, f filter, p phase."))
            board.update("")
            shown.update("")
            return
        found = measures(self.group)
        measure = self.measure if self.measure in found else next(iter(found), None)
        rollout = self.group["rollouts"][self.sibling]
        board.update(group_map(self.group, self.sibling, measure, board.size.width))
        about.update(self._about(rollout, measure))
        shown.update(transcript(rollout, self.token, is_whole=self.shows_whole))

    def _about(self, rollout: View, measure: Measure | None) -> Text:
        assert self.group is not None
        group = self.group
        text = Text().append(f"{PHASES.get(group['phase'], group['phase'])}, step {group['step']}", "dim")
        text.append(f"\n{group['question']}", "bold")
        text.append(f"\ngold: {' | '.join(group['gold'])}")
        numbers = [f"{name} {rollout[name]:.2f}" for name in ("reward", "advantage") if name in rollout]
        told = ", ".join([f"sibling {name_of(rollout)}: {rollout['verdict']}", *numbers])
        text.append(f"\n{told}")
        text.append(
            f"\nshown: {measure.label}" if measure else "\nno teacher was asked here, and no credit given", "dim"
        )
        block = group.get("block") or rollout.get("block")
        if self.shows_block:
            text.append(f"\n{block}" if block else "\nno hindsight block", "italic")
        return text


def _next(every: list[_T], now: _T) -> _T:
    return every[(every.index(now) + 1) % len(every)]


def browse(run_folder: Path) -> None:
    """Shows a run's rollouts until the user quits.

    Raises:
        ConfigError: the run has no rollouts.
        DataError: as `read_trajectories`.
    """
    path = run_folder / "trajectories.jsonl"
    if sum(file.stat().st_size for file in run_folder.glob(f"{path.stem}*")) > LARGE:
        print(f"reading {harmless(str(path))} ...", flush=True)
    rollouts = read_rollouts(path, BUDGET)
    if not rollouts.groups:
        raise ConfigError(
            f"expected a run folder with rollouts in trajectories.jsonl, found none in {run_folder}. "
            "Give a folder such as runs/quickstart."
        )
    RolloutBrowser(printable(run_folder.resolve().name), rollouts).run()
