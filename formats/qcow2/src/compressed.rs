// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Inflating compressed clusters, and keeping the last ones for readers of small pieces.

use crate::geometry::to_usize;
use crate::header::Compression;
use flate2::{Decompress, FlushDecompress, Status};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Result};

/// Inflated clusters that are kept.
const KEPT: usize = 8;

/// Start and length in the file.
pub(crate) type Place = (u64, u64);

/// The last inflated clusters by their place in the file. A place never gets other
/// contents while the image is open, since nothing here writes compressed clusters.
#[derive(Debug, Default)]
pub(crate) struct Inflated(Vec<(Place, Arc<Vec<u8>>)>);

impl Inflated {
    pub(crate) fn get(&self, place: Place) -> Option<Arc<Vec<u8>>> {
        self.0.iter().find(|(kept, _)| *kept == place).map(|(_, bytes)| bytes.clone())
    }

    pub(crate) fn put(&mut self, place: Place, bytes: Arc<Vec<u8>>) {
        if self.0.len() >= KEPT {
            self.0.remove(0);
        }
        self.0.push((place, bytes));
    }
}

/// Reads and inflates the cluster in at most `len` bytes from `start`.
pub(crate) fn read(
    file: &dyn BlockDevice,
    compression: Compression,
    (start, len): Place,
    cluster_len: usize,
) -> Result<Vec<u8>> {
    // The length is rounded up to sectors, so the last one may end past the file.
    let there = len.min(file.size().saturating_sub(start));
    if there == 0 {
        return Err(Error::corrupt(format!(
            "compressed cluster starts past the file's {} bytes",
            file.size()
        ))
        .at(start));
    }
    let mut packed = vec![0; to_usize(there)?];
    file.read_at(&mut packed, start)?;
    let mut cluster = vec![0; cluster_len];
    let found = match compression {
        Compression::Deflate => inflate(&packed, &mut cluster),
        Compression::Zstd => unpack_zstd(&packed, &mut cluster),
    };
    match found {
        Ok(found) if found == cluster_len => Ok(cluster),
        Ok(found) => Err(format!("inflates to {found} bytes, expected {cluster_len}")),
        Err(fault) => Err(fault),
    }
    .map_err(|fault| Error::corrupt(format!("compressed cluster {fault}")).at(start))
}

/// Only as much as the cluster holds is inflated: what a stream claims beyond is an error.
fn inflate(packed: &[u8], cluster: &mut [u8]) -> std::result::Result<usize, String> {
    let mut stream = Decompress::new(false);
    let status = stream
        .decompress(packed, cluster, FlushDecompress::Finish)
        .map_err(|error| format!("is no deflate stream: {error}"))?;
    let out = usize::try_from(stream.total_out()).unwrap_or(usize::MAX);
    match status {
        Status::StreamEnd => Ok(out),
        // The cluster is full. The stream's end mark may still be to come, but no bytes.
        _ if out == cluster.len() => {
            let used = usize::try_from(stream.total_in()).unwrap_or(usize::MAX);
            let rest = packed.get(used..).unwrap_or_default();
            match stream.decompress(rest, &mut [0], FlushDecompress::Finish) {
                Ok(Status::StreamEnd) if stream.total_out() == to_total(out) => Ok(out),
                _ => Err(format!("inflates to more than {out} bytes")),
            }
        }
        _ => Ok(out),
    }
}

fn to_total(out: usize) -> u64 {
    u64::try_from(out).unwrap_or(u64::MAX)
}

/// One frame that fills the cluster; what follows it is padding.
fn unpack_zstd(packed: &[u8], cluster: &mut [u8]) -> std::result::Result<usize, String> {
    let fault = |error: std::io::Error| format!("is no zstd frame of its size: {error}");
    let mut reader =
        zstd::stream::read::Decoder::with_buffer(packed).map_err(fault)?.single_frame();
    let mut found = 0;
    while let Some(rest) = cluster.get_mut(found..)
        && !rest.is_empty()
    {
        match std::io::Read::read(&mut reader, rest).map_err(fault)? {
            0 => return Ok(found),
            count => found = found.saturating_add(count),
        }
    }
    match std::io::Read::read(&mut reader, &mut [0]).map_err(fault)? {
        0 => Ok(found),
        _ => Err(format!("inflates to more than {found} bytes")),
    }
}
