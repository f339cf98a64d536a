"""The token page of a training step, in a Trainer's folder and for its reporters."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fxseek.errors import FxseekError, InputError
from fxseek.reports.step import StepReport
from fxseek.reports.texts import check_tokenizer

__all__ = ["TokenPages"]

log = logging.getLogger("fxseek")

_KEY = "fxseek/tokens"


class TokenPages:
    """Writes a page every so many steps: ``<output_dir>/fxseek/tokens-<step>.html``.

    TensorBoard, which shows no pages, gets a text with the first row; trackio and wandb the page.
    """

    def __init__(self, every: int, tokenizer: Any) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InputError(
                f"html_every={every!r} must be a number of steps, such as 100, or None"
            )
        self.every = every
        self.tokenizer = tokenizer
        self._told: set[str] = set()

    def check(self, tokenizer: Any, score: Any, scored: bool) -> None:
        """Take the Trainer's tokenizer where none was given; say what is missing before a run.

        Raises:
            InputError: there is no tokenizer that makes text of ids, or no score to show.
        """
        if self.tokenizer is None:
            self.tokenizer = tokenizer
        if self.tokenizer is None:
            raise InputError(
                "SeekCallback(html_every=...) shows tokens as text: pass tokenizer=, or give the "
                "Trainer a processing_class"
            )
        check_tokenizer(self.tokenizer)
        if not scored or score == "random":
            raise InputError(
                "SeekCallback(html_every=...) shows scores, and the model is compiled to measure "
                'none (score="random", ratio=1.0 or ratio="labelled"): leave html_every out'
            )

    def write(self, report: StepReport, args: Any, state: Any, reporters: Any) -> None:
        """Write the page of a step. What keeps it from a file or a reporter is told once each."""
        step = state.global_step
        path = Path(args.output_dir) / "fxseek" / f"tokens-{step}.html"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            report.to_html(self.tokenizer, path)
        except (OSError, FxseekError) as error:
            self._tell("", "no token page of step %s: %s", step, error)
            return
        for reporter in reporters:
            try:
                self._hand_over(reporter, report, path, step)
            except Exception as error:  # of a library that shows pages: training goes on
                name = type(reporter).__name__
                self._tell(name, "no token page for %s: %r", name, error)

    def _tell(self, reporter: str, message: str, *arguments: Any) -> None:
        """Warn once for each reporter, and once for the file ("")."""
        if reporter not in self._told:
            self._told.add(reporter)
            log.warning(f"fxseek: {message}", *arguments)

    def _hand_over(self, reporter: Any, report: StepReport, path: Path, step: int) -> None:
        """Give the page to a reporter of transformers that can show it."""
        name = type(reporter).__name__
        if name == "TensorBoardCallback" and reporter.tb_writer is not None:
            reporter.tb_writer.add_text(_KEY, report.to_markdown(self.tokenizer), step)
        for kind, attribute in (("WandbCallback", "_wandb"), ("TrackioCallback", "_trackio")):
            library = getattr(reporter, attribute, None)
            if name == kind and library is not None:
                page = library.Html(str(path), inject=False)
                library.log({_KEY: page, "train/global_step": step})
