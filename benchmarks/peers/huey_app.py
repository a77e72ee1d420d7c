"""What Huey's consumer imports."""

from benchmarks.peers.huey import opened
from benchmarks.place import Place

huey, task = opened(Place.of_this_process())
