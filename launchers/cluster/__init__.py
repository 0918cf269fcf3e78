"""Ray itself: joining a cluster, starting workers, calling them, telling faults apart."""
