"""Records of array_record files by their number, neighbours in a file by one read.

array_record's own data source, which TFDS has, takes a read a record however many are asked for.
"""

import concurrent.futures
import threading
from collections.abc import Callable, Sequence

import numpy as np

# A network file system's wait is of milliseconds: reads in flight, where a batch's records are no
# neighbours.
_READS_AT_ONCE = 16
# Neighbours of no more bytes than this are one read: 13 clips of 10 s.
_READ_BYTES = 4 << 20


class Records:
    """Parts of files, one after another; may be read from several threads.

    Args:
      files: TFDS' file instructions: `filename`, and that `take` records follow on `skip`.
      decode: what is made of a record's bytes.
    """

    def __init__(self, files: Sequence, decode: Callable[[bytes], dict]):
        self._names = [str(file.filename) for file in files]
        self._ends = np.cumsum([file.take for file in files])
        # Added to a record's number, its number in its file.
        self._shifts = np.array([file.skip + file.take for file in files]) - self._ends
        self._decode = decode
        self._readers = [None] * len(files)
        self._opening = threading.Lock()
        self._threads = concurrent.futures.ThreadPoolExecutor(_READS_AT_ONCE)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, indices: Sequence[int]) -> list[dict]:
        """In the order of `indices`; raises IndexError for one that is none of them."""
        return [self._decode(record) for record in self.read_bytes(indices)]

    def read_bytes(self, indices: Sequence[int]) -> list[bytes]:
        """As `read`, not decoded."""
        indices = np.asarray(indices, np.int64)
        if not len(indices):
            return []
        if not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"records {indices.min()} to {indices.max()} of {len(self)}")
        numbers, places = np.unique(indices, return_inverse=True)
        files = np.searchsorted(self._ends, numbers, side="right")
        numbers += self._shifts[files]
        starts = 1 + np.flatnonzero((np.diff(numbers) != 1) | (np.diff(files) != 0))
        runs = np.split(numbers, starts)
        run_files = files[[0, *starts]]
        read = self._threads.map if len(runs) > 1 else map
        records = [record for run in read(self._read_run, run_files, runs) for record in run]
        return [records[place] for place in places]

    def _read_run(self, file: int, run: np.ndarray) -> list[bytes]:
        """Records of a file, of the numbers from run[0] to run[-1]."""
        return self._reader(file).read(int(run[0]), int(run[-1]) + 1)

    def _reader(self, file: int):
        from array_record.python import array_record_module

        with self._opening:
            if self._readers[file] is None:
                self._readers[file] = array_record_module.ArrayRecordReader(
                    self._names[file],
                    options=f"readahead_buffer_size:{_READ_BYTES}",
                    # Beyond it a read goes past the buffer, of just the bytes that are wanted.
                    file_reader_buffer_size=32 << 10,
                )
            return self._readers[file]
