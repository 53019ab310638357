//! A registry in an S3 bucket: `docs/decisions/0004-a-registry-in-a-bucket.md`.

#[cfg(test)]
mod interleavings;
