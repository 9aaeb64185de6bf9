"""Training on many devices and in several processes: layouts, and the rows that each process has."""

from keras_fam.distribution.fully_sharded import fully_shard as fully_shard
from keras_fam.distribution.processes import gather_position as gather_position
from keras_fam.distribution.processes import gather_rows as gather_rows
from keras_fam.distribution.processes import own_rows as own_rows
from keras_fam.ops.processes import independent_processes as independent_processes
from keras_fam.ops.processes import process_shard as process_shard
