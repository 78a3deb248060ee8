"""Every file type gives the same numbered rows."""

import gzip
import json

from conftest import write_jsonl
from posttrain.data.files import list_files, read_rows


def test_every_file_type_gives_the_same_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": "a ->", "completion": " b, c"}, {"prompt": "d ->", "completion": ' "e"'}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text('prompt,completion\na ->," b, c"\nd ->," ""e"""\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = {p.name: list(read_rows(p)) for p in list_files(tmp_path, "train_file")}
    assert len(found) == 5
    assert all(value == list(enumerate(rows, 1)) for value in found.values()), found
