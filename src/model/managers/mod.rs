//! Long-lived weights, one manager a network.
