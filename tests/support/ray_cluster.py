"""A Ray cluster of two CPUs on the loopback, up until stdin ends: ``ray_cluster.py FOLDER`` prints its address."""

import signal
import sys

import ray

if __name__ == "__main__":
    # A shell's background jobs ignore the signal, and so would workers, by which Ray tells them to stop.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ray.init(
        num_cpus=2,
        object_store_memory=80_000_000,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1",
        _temp_dir=sys.argv[1],
    )
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
