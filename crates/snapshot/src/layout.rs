//! The directory layout shared by the backends.
