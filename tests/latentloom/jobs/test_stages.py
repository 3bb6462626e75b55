"""What the steps of a job say before they begin."""

from dataclasses import replace

import pytest
from tiny_models import tiny_source

from latentloom.jobs.stages import print_classes


def test_classes_are_counted_and_those_without_a_training_image_are_named_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tiny_source()
    print_classes(source)
    assert capsys.readouterr().out.startswith("3 classes: ")
    first = source.train.select([i for i, label in enumerate(source.train.labels or ()) if label == 0])
    print_classes(replace(source, train=first))
    _, warning = capsys.readouterr().out.splitlines()
    assert ", ".join((source.label_names or ())[1:]) in warning
    assert "2 in all" in warning


def test_a_source_without_classes_gives_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    print_classes(replace(tiny_source(labelled=False), unlabelled_reason="there are no class folders"))
    assert capsys.readouterr().out == "no classes: there are no class folders\n"
