"""One line that changes, and stays one."""

from mlx_qwen35.cli import progress


def test_a_narrow_terminal_gets_a_line_that_fits(monkeypatch, capsys):
    monkeypatch.setattr("_pytest.capture.CaptureIO.isatty", lambda self: True)
    monkeypatch.setattr(progress, "columns", lambda out: 20)
    monkeypatch.setattr(progress, "REDRAW_SECONDS", 0)
    told = progress.Progress("Reading the prompt", "tokens")
    for done in (0, 500, 1000):
        told(done, 1000)
    *lines, last = capsys.readouterr().err.split("\r\x1b[K")[1:]
    assert len(lines) == 2 and all(len(line) == 19 for line in lines)
    assert last.startswith("Reading the prompt: 1,000 tokens of 1,000 tokens") and last.endswith("\n")
