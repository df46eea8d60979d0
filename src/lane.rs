//! The compute thread.
