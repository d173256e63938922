"""Deterministic simulation: whole clusters of production code in one thread, under virtual time,
decided by one seed.

    real        gateway (service, starter, runners, lifecycle, router, state writer, takeover), workers (sessions, leases,
                schedulers, block managers, engine loops), KV sender, receiver and assembly, state
                store and registry
    simulated   clock and event loops (`virtual_time`), gRPC (`network`), threads (`threads`), Redis (`redis_model`), the model
                and its pool (`toy_model`), clients (`client`), faults (`faults`)

Start at `run_seed` in `run`. `python -m tests.simulation --seeds 0:10000` runs many.
"""
