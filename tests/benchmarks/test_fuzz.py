"""The fuzzing of a server without the server: what is left out, what is bounded, and what is counted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import fuzz


def test_paths_that_change_the_engines_are_left_out() -> None:
    schema = {"openapi": "3.1.0", "paths": {"/health": {"get": {}}, "/scale_elastic_ep": {"post": {}}}}
    assert fuzz.bounded(schema) == {"openapi": "3.1.0", "paths": {"/health": {"get": {}}}}
    assert len(schema["paths"]) == 2


def test_what_a_request_asks_for_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("schemathesis")
    monkeypatch.syspath_prepend(str(Path(fuzz.__file__).parent))
    from fuzz_hooks import bound

    body = {"n": 10**9, "max_tokens": "many", "seed": 3, "conversation": [{"min_tokens": 17.5, "top_p": 5}]}
    bound(body)
    assert body == {"n": 4, "max_tokens": "many", "conversation": [{"min_tokens": 16, "top_p": 5}]}


def test_answers_are_counted_by_path_and_status() -> None:
    text = """# TYPE http_requests_total counter
http_requests_total{handler="/v1/models",method="GET",status="2xx"} 3.0
http_requests_total{handler="/v1/models",method="POST",status="4xx"} 2.0
http_requests_total{handler="/v1/models",method="PUT",status="4xx"} 1.0
"""
    assert fuzz.answered(text) == {("/v1/models", "2xx"): 3, ("/v1/models", "4xx"): 3}


def test_errors_are_read_from_a_log() -> None:
    log = """(APIServer pid=1) ERROR 11-29 12:00:00 [serving.py:1] ValueError: no message
(APIServer pid=1) INFO 11-29 12:00:00 [x.py:1] ValueError is what it was
IndexError: list index out of range
IndexError: list index out of range
"""
    assert fuzz.errors_in(log) == {"IndexError: list index out of range": 2, "ValueError: no message": 1}


def test_a_missing_command_is_refused_before_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["fuzz", "examples/fox-tiny", f"--json={tmp_path}/f.json", f"--schemathesis={tmp_path}/none"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        fuzz.main()
    assert ended.value.code == 2 and "schemathesis is not there" in capsys.readouterr().err
