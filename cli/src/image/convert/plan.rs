// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the options of a copy mean, checked before anything is opened.

use crate::args::image::ConvertArgs;
use crate::failure::Failure;
use crate::image::sizes;
use crate::image::{options, source};
use tranship_block::CopyOptions;

/// Longest run of zeroes that may be asked for with `-S`.
const MOST_SPARSE: u64 = 16 << 20;
/// Bytes of a chunk of a hash manifest.
pub(super) const HASH_CHUNK: u64 = 1 << 20;

/// A copy as it was asked for.
#[derive(Debug)]
pub(super) struct Plan {
    /// What was given with `-o`.
    pub(super) list: Option<String>,
    /// The list asks for help.
    pub(super) wants_help: bool,
    /// The copy engine's part.
    pub(super) copying: CopyOptions,
    /// The copy ends only when the disk has it.
    pub(super) durable: bool,
    /// The target goes past the page cache.
    pub(super) direct: bool,
}

impl Plan {
    pub(super) fn new(args: &ConvertArgs) -> Result<Self, Failure> {
        let list = options::joined(&args.target_options)?;
        let wants_help = list.as_deref().is_some_and(options::asks_for_help);
        source::cache(args.target_cache.as_deref(), "")?;
        source::cache(args.source_cache.as_deref(), "source ")?;
        let zero_block = args.sparse_size.as_deref().map_or(Ok(4096), sparse)?;
        let threads = args.parallel.as_deref().map(threads).transpose()?;
        refuse_contradictions(args, list.is_some())?;
        let cache = args.target_cache.as_deref().unwrap_or("unsafe");
        let mut copying = CopyOptions {
            zero_block: if args.copy_range_offloading { 0 } else { zero_block },
            allocate: args.sparse_size.is_some() && zero_block == 0,
            salvage: args.reading.salvage,
            offload: args.copy_range_offloading,
            hash: args.hash.as_ref().map(|_| HASH_CHUNK),
            ..CopyOptions::default()
        };
        if let Some(threads) = threads {
            copying.threads = threads;
        }
        Ok(Self {
            list,
            wants_help,
            copying,
            durable: cache != "unsafe",
            direct: matches!(cache, "none" | "off" | "directsync"),
        })
    }
}

fn sparse(text: &str) -> Result<u64, Failure> {
    match sizes::parse(text) {
        Ok(size) if size % 512 == 0 && size <= MOST_SPARSE => Ok(size),
        _ => Err(Failure::usage(format!(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 \
             up to {MOST_SPARSE}. Select 0 to disable sparse detection (fully allocates output)."
        ))),
    }
}

fn threads(text: &str) -> Result<usize, Failure> {
    match text.parse() {
        Ok(threads @ 1..=16) => Ok(threads),
        _ => {
            Err(Failure::usage("Invalid number of coroutines specified. Must be between 1 and 16."))
        }
    }
}

fn refuse_contradictions(args: &ConvertArgs, has_options: bool) -> Result<(), Failure> {
    let refuse = |text: &str| Err(Failure::usage(text));
    if args.source_image_opts && args.source_format.is_some() {
        return refuse("--image-opts and --format are mutually exclusive");
    }
    if args.target_image_opts && !args.no_create {
        return refuse("--target-image-opts requires use of -n flag");
    }
    if args.target_is_zero && !args.no_create {
        return refuse("--target-is-zero requires use of -n flag");
    }
    if args.no_create && has_options {
        return refuse("-o has no effect when skipping image creation");
    }
    if args.copy_range_offloading && args.compress {
        return refuse("Cannot enable copy offloading when -c is used");
    }
    if args.copy_range_offloading && args.sparse_size.is_some() {
        return refuse("Cannot enable copy offloading when -S is used");
    }
    if args.copy_range_offloading && (args.hash.is_some() || args.reading.salvage) {
        return refuse("--hash and --salvage have to see the bytes that -C leaves to the system");
    }
    if args.backing.is_some() && args.backing_format.is_none() {
        return refuse("Use of backing file requires explicit backing format");
    }
    if args.skip_broken_bitmaps && !args.bitmaps {
        return refuse("Use of --skip-broken-bitmaps requires --bitmaps");
    }
    if args.bitmaps && args.source_snapshot.is_some() {
        return refuse("Bitmaps of a snapshot cannot be copied");
    }
    if args.resume && args.no_create {
        return refuse("--resume goes on with a new image, which -n does not make");
    }
    if args.resume && args.compress {
        return refuse("a compressed image is written in one go: it cannot be resumed");
    }
    Ok(())
}
