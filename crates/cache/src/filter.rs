//! containerd's filter language.
