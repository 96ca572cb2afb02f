"""What a run of Weights & Biases leaves behind, and how it ends."""

import json


def end(wandb):
    """End a run and wait for wandb's process, which may still write after `finish`."""
    wandb.finish()
    wandb.teardown()


def history(run):
    """Return the rows of an offline run of Weights & Biases, whose file is a log in LevelDB's format."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run.glob("*.wandb")
    data, at, record, rows = path.read_bytes(), 7, b"", []
    while at < len(data):
        if (room := -at % 2**15) < 7:  # what is left of a block of 32 KiB is too small for a header: padding
            at += room
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            items = Record.FromString(record).history.item
            rows.append({"/".join(item.nested_key): json.loads(item.value_json) for item in items})
            record = b""
    return rows
