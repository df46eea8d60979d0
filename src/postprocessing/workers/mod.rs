//! Workers of the postprocessing domain.
