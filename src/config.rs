//! The configuration file, `configs/workers_config.json`: one section per domain, each owned by its interface.
