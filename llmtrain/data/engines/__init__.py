"""Who runs work units: this process, processes on this machine, or a cluster."""
