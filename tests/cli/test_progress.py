"""Progress of a model that is being made, where there is no terminal: a line for each stage and
each tenth.
"""

import pytest

from kvrelay.cli.model_commands import progress_bar


def test_without_a_terminal_each_stage_and_each_tenth_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as progress:
        for stage, fraction in (
            ("fetching", 0.0),
            ("fetching", 0.05),
            ("fetching", 0.1),
            ("converting", 0.12),
            ("converting", 1.0),
        ):
            progress(stage, fraction)
    assert capsys.readouterr().err == "  0% fetching\n 10% fetching\n 12% converting\n100% converting\n"
