"""What a stage prints about the classes before it begins."""

from dataclasses import replace

import pytest
from tiny_models import tiny_source

from latentloom.jobs.stages import print_classes


def test_classes_are_counted_and_empty_ones_are_named_in_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tiny_source()
    print_classes(source)
    assert capsys.readouterr().out.startswith("3 classes: ")
    first_class = source.train.select([i for i, label in enumerate(source.train.labels or ()) if label == 0])
    print_classes(replace(source, train=first_class))
    _, warning = capsys.readouterr().out.splitlines()
    assert ", ".join((source.label_names or ())[1:]) in warning
    assert "2 classes have no training image" in warning


def test_a_source_without_classes_prints_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    print_classes(replace(tiny_source(labelled=False), unlabelled_reason="there are no class folders"))
    assert capsys.readouterr().out == "no classes: there are no class folders\n"
