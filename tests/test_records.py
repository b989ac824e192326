"""The records of volumes in Azure: changed by one at a time, and read whatever a policy makes of their tags' names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from coriolis_azure.azure import names
from coriolis_azure.model import Record, Run
from coriolis_azure.run.records import Records
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.source import Source
from harness.clocks import Held

ID = "0123456789abcdef"


def records(source: Source) -> Records:
    run = Run("r", source.azure.subscription, "sandbox", "westeurope", "", "web")
    return Records(source.azure, run, {"costs": "42"}, Held())


def test_a_change_that_comes_between_reading_and_writing_is_not_lost(azure: Sandbox, source: Source) -> None:
    """The writer is another one by then, which is what the change must see."""
    kept = records(source)
    struck: list[str] = []
    kept.update(ID, lambda _: Record(ID, "disk", "state", "first"))

    def between(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "PUT" and not struck:
            struck.append(request.path)
            kept.update(ID, lambda found: replace(found or Record(ID, "disk"), writer="second"))
        return answer(request)

    azure.intercept = between
    seen: list[str] = []

    def emptied(found: Record | None) -> Record:
        assert found is not None
        seen.append(found.writer)
        return replace(found, holds="")

    kept.update(ID, emptied)
    assert seen == ["first", "second"]
    found = kept.find(ID)
    assert found is not None
    assert (found.holds, found.writer) == ("", "second")


def test_a_record_keeps_foreign_tags_and_its_own_are_found_in_any_case(source: Source) -> None:
    kept = records(source)
    kept.update(ID, lambda _: Record(ID, "disk", "state", "run"))
    (listed,) = kept.all()
    tags = source.azure.get(listed.id)["tags"]
    assert tags["costs"] == "42"
    assert names.RUN_TAG not in tags
    source.azure.tag(listed.id, {name.title(): tag for name, tag in {**tags, "owner": "them"}.items()})
    assert [record.holds for record in kept.of_disk("disk")] == ["state"]
    assert (listed.instance, listed.alive is not None) == ("web", True)
    kept.update(ID, lambda found: replace(found or Record(ID, "disk"), writer=""))
    after = source.azure.get(listed.id)["tags"]
    assert after["Owner"] == "them"
    assert kept.find(ID) == replace(listed.record, writer="", beat=after[names.ALIVE_TAG])
