//! Workers of the conditioning domain.
