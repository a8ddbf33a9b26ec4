"""What a prepared source holds, and all that was left out of it or altered, as a table."""

from pipeline.data.shards.index import Index

MOST_EXAMPLES = 3
MOST_WIDTH = 140


def describe_preparation(index: Index) -> str:
    """Lines for a terminal; `report` in index.json has the same with more examples."""
    size = sum(shard.num_bytes for shard in index.shards)
    lines = [
        f"shards of {index.name}: {index.num_samples:,} images, {index.num_boxes:,} boxes, "
        f"{len(index.shards):,} shards, {size / 1e9:.3g} GB, in {index.url}"
    ]
    for reason, count, examples in _entries(index):
        lines.append(f"  {count:>10,}  {reason}")
        lines.extend(f"              {_cut(example)}" for example in examples[:MOST_EXAMPLES])
    return "\n".join(lines)


def _entries(index: Index) -> list[tuple[str, int, list[str]]]:
    """(reason, count, examples), the most frequent first; then unreadable and scaled images."""
    report = index.report
    dropped, examples = report.get("dropped", {}), report.get("examples", {})
    unreadable, scaled = report.get("unreadable", []), report.get("scaled", {})
    assert isinstance(dropped, dict) and isinstance(examples, dict)
    assert isinstance(unreadable, list) and isinstance(scaled, dict)
    entries = [
        (reason, count, list(examples.get(reason, [])))
        for reason, count in sorted(dropped.items(), key=lambda item: -item[1])
        if count
    ]
    if unreadable:
        reasons = [reason for _, reason in unreadable]
        entries.append(("unreadable images left out", len(unreadable), reasons))
    if scaled.get("images"):
        before, after = scaled["bytes_before"], scaled["bytes_after"]
        saved = f"{before / 1e6:,.1f} MB became {after / 1e6:,.1f} MB"
        entries.append((f"images scaled down: {saved}", scaled["images"], []))
    return entries


def _cut(text: str) -> str:
    """Long texts begin with a path and end with what is wrong."""
    half = (MOST_WIDTH - 3) // 2
    return text if len(text) <= MOST_WIDTH else f"{text[:half]}...{text[-half:]}"
