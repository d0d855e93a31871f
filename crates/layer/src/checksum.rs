//! BuildKit's content digests of trees.
