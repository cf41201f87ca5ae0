// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Words that make and change images, and what the images are like afterwards.

use crate::{Case, differs, same};

/// Words one after another, in fresh folders.
pub(crate) struct Row {
    pub(crate) cases: &'static [Case],
    /// The image that has to be the same afterwards, for its guest and for qemu-img.
    pub(crate) result: Option<&'static str>,
}

/// The image `result` has to come out the same.
const fn makes(result: &'static str, cases: &'static [Case]) -> Row {
    Row { cases, result: Some(result) }
}

/// Only the words matter.
const fn says(cases: &'static [Case]) -> Row {
    Row { cases, result: None }
}

pub(crate) const ROWS: &[Row] = &[
    // create: the words.
    says(&[
        same("create"),
        same("create a.raw"),
        same("create a.raw 1x"),
        same("create a.raw 1MiB"),
    ]),
    says(&[same("create a.raw ''"), same("create a.raw 8E"), same("create a.raw -- -1")]),
    says(&[same("create a.raw -1"), same("create -f foo a.raw 1M"), same("create a.raw 1M 2M")]),
    says(&[
        same("create -f qcow2 q.q 1M -o foo=1"),
        same("create -f qcow2 q.q 1M -o cluster_size=3"),
    ]),
    says(&[same("create -f qcow2 q.q 1M -o cluster_size=")]),
    says(&[same("create -f qcow2 q.q 1M -o lazy_refcounts=maybe")]),
    says(&[same("create -f qcow2 q.q -o size=5M,cluster_size=4k 1M")]),
    says(&[same("create -f qcow2 /nodir/q.q 1M")]),
    says(&[same("create -f qcow2 -b a.q q.q"), same("create -f qcow2 -b nofile -F qcow2 q.q")]),
    says(&[
        same("create -f qcow2 -b nofile -F qcow2 -u q.q"),
        same("create -f qcow2 -u -b a.q q.q 1M"),
    ]),
    says(&[same("create -f raw -b a.q -F qcow2 q.q"), same("create -f raw -F raw q.q 1M")]),
    says(&[same("create -f qcow2 -F qcow2 q.q 10M"), same("create -f qcow2 -b a.q -F foo q.q")]),
    says(&[same("create -f qcow2 -b q.q -F qcow2 q.q 1M"), same("create -f dmg q.q 1M")]),
    says(&[same("create -f qcow2 q.q 7E"), same("create -f qcow2 -o , q.q 1M")]),
    says(&[same("create -f qcow2 -o '' q.q 1M"), same("create -f qcow2 -o =a q.q 1M")]),
    says(&[same("create -f qcow2 json:{} 1M"), same("create -f qcow2 foo:bar 1M")]),
    says(&[same("create -f qcow2 '' 1M"), same("create -f qcow2 -b a.q -F qcow2 x/qq.q")]),
    says(&[same("create -f qcow2 q.q 1M -o compat=0.10,refcount_bits=8")]),
    says(&[same("create -f qcow2 q.q 1M -o refcount_bits=7")]),
    says(&[same("create -f qcow2 q.q 1M -o extended_l2=on,cluster_size=4k")]),
    says(&[same("create -f qcow2 q.q 1M -o compression_type=lz4")]),
    says(&[same("create -f qcow2 q.q 1M -o preallocation=foo")]),
    says(&[same("create -f qcow2 q.q 1M -o compat=v4")]),
    says(&[same("create -f qcow2 q.q 1M -o data_file_raw=on")]),
    says(&[same("create -f qcow2 q.q 1M -o encrypt.format=luks")]),
    says(&[same("create -f qcow2 q.q 1M -o compat=0.10,lazy_refcounts=on")]),
    says(&[same("create -f qcow2 q.q 1M -o compat=0.10,compression_type=zstd")]),
    says(&[same("create -f qcow2 q.q -b a.q -F qcow2 -o preallocation=full")]),
    says(&[same("create -f raw q.raw -o preallocation=metadata 1M")]),
    says(&[same("create -f raw q.raw -o preallocation=foo 1M")]),
    says(&[differs("create -f vhdx -b a.q -F qcow2 q.vhdx 1M", "a VHDX can have a VHDX below")]),
    // create: the images.
    makes("q.raw", &[same("create q.raw 1M")]),
    makes("q.raw", &[same("create q.raw 1000")]),
    makes("q.raw", &[same("create -q q.raw 1M")]),
    makes("q.raw", &[same("create q.raw -o preallocation=full 1M")]),
    makes("q.raw", &[same("create q.raw 1M -o nocow=on,extent_size_hint=0")]),
    makes("c.raw", &[same("create c.raw 1M")]),
    makes("q.q", &[same("create -f qcow2 q.q -o size=5M,size=6M")]),
    makes(
        "q.q",
        &[same("create -f qcow2 -b nofile -F qcow2 -u q.q 1M"), same("create -f qcow2 q.q 1M")],
    ),
    makes("q.q", &[same("create -f qcow2 -b a.q -F qcow2 q.q")]),
    makes("q.q", &[same("create -f qcow2 -b a.q -o backing_fmt=qcow2 q.q 10M")]),
    makes("x/q.q", &[same("create -f qcow2 -b ../a.q -F qcow2 x/q.q")]),
    makes("q.q", &[same("create -f qcow2 -b c.vmdk -F vmdk q.q 11M")]),
    makes("q.q", &[same("create -f qcow2 q.q 100")]),
    says(&[same("create -f qcow2 q.q 0"), same("map -f qcow2 q.q")]),
    makes("q.q", &[same("create -f qcow2 -o cluster_size=4k -o lazy_refcounts=on q.q 1M")]),
    makes("q.q", &[same("create -f qcow2 q.q 1M -o preallocation=metadata")]),
    makes("q.q", &[same("create -f qcow2 q.q 1M -o preallocation=falloc")]),
    makes("q.q", &[same("create -f qcow2 q.q 1M -o preallocation=full,cluster_size=512")]),
    makes("q.q", &[same("create -f qcow2 q.q 1M -o compression_type=zstd,extended_l2=on")]),
    makes("q.q", &[same("create -f qcow2 q.q 1M -o compat=0.10")]),
    makes("q.q", &[same("create -f qcow2 q.q 1M -o refcount_bits=1,cluster_size=2M")]),
    makes("q.q", &[same("create -f qcow2 q.q 1M -o data_file=qd.raw,data_file_raw=on")]),
    makes(
        "q.q",
        &[same("create -f qcow2 q.q 1M -o lazy_refcounts"), same("check q.q"), same("map q.q")],
    ),
    makes("qq,a.q", &[same("create -f qcow2 -b a.q -F qcow2 qq,a.q")]),
    makes("a.q", &[same("create -f qcow2 file:a.q 1M")]),
    makes("q.vmdk", &[same("create -f vmdk q.vmdk 10M")]),
    makes(
        "q.vmdk",
        &[same("create -f vmdk q.vmdk 10M -o adapter_type=lsilogic,hwversion=7,zeroed_grain=on")],
    ),
    makes("q.vmdk", &[same("create -f vmdk -o subformat=monolithicFlat q.vmdk 10M")]),
    makes("q.vmdk", &[same("create -f vmdk -o subformat=streamOptimized q.vmdk 10M")]),
    makes("q.vmdk", &[same("create -f vmdk -o subformat=twoGbMaxExtentSparse q.vmdk 3G")]),
    makes("q.vmdk", &[same("create -f vmdk -b c.vmdk -F vmdk q.vmdk")]),
    says(&[
        same("create -f vmdk q.vmdk 10M -o subformat=foo"),
        same("create -f vmdk q.vmdk 10M -o adapter_type=foo"),
    ]),
    says(&[
        same("create -f vmdk -b a.q -F qcow2 q.vmdk"),
        same("create -f vmdk q.vmdk 10M -o compat6=on,hwversion=4"),
    ]),
    makes("q.vhdx", &[same("create -f vhdx q.vhdx 10M")]),
    makes("q.vhdx", &[same("create -f vhdx -o subformat=fixed,block_size=1M q.vhdx 10M")]),
    says(&[same("create -f vhdx -o block_size=3M q.vhdx 10M"), same("create -f vhdx q.vhdx 65T")]),
    says(&[same("create -f vhdx -o subformat=foo q.vhdx 10M")]),
    makes("q.vpc", &[same("create -f vpc q.vpc 10M")]),
    says(&[
        same("create -f vpc -o subformat=fixed q.vpc 10M"),
        differs("map --output json -f vpc q.vpc", "holes of a fixed disk are known"),
    ]),
    makes("q.vpc", &[same("create -f vpc -o force_size=on q.vpc 10M")]),
    says(&[same("create -f vpc q.vpc 3T"), same("create -f vpc -o subformat=foo q.vpc 10M")]),
    // resize
    says(&[
        differs("resize c.vpc 20M", "a VHD can be resized"),
        differs("resize c.vhdx 20M", "a VHDX can be resized"),
    ]),
    says(&[differs("resize c.vmdk +1M", "a VMDK can grow")]),
    says(&[same("resize --shrink c.vmdk 1M"), same("resize --preallocation=full c.vmdk +1M")]),
    says(&[same("resize so.vmdk +1M"), same("resize child.vmdk +1M")]),
    says(&[same("resize"), same("resize a"), same("resize nofile 1M"), same("resize r.q foo")]),
    says(&[
        same("resize r.q ''"),
        same("resize r.q 0"),
        same("resize r.q -100M"),
        same("resize r.q +8E"),
    ]),
    says(&[same("resize --preallocation=foo r.q +1M"), same("resize --shrink c.raw")]),
    says(&[same("resize --preallocation=full --shrink r.q -1M")]),
    says(&[same("resize --preallocation=metadata c.raw -f raw +1M")]),
    makes("r.q", &[same("resize r.q -1M"), same("resize r.q -- -1M"), same("resize r.q 5M")]),
    makes("r.q", &[same("resize r.q 20M"), same("resize r.q +1M")]),
    makes("r.q", &[same("resize --shrink r.q -7M"), same("resize r.q +7M")]),
    makes("r.q", &[same("resize r.q 5M --shrink"), same("resize -q r.q +1M")]),
    makes("r.q", &[same("resize r.q +0"), same("resize r.q 4T")]),
    makes("r.q", &[same("resize --preallocation=full r.q +1M")]),
    makes("r.q", &[same("resize --preallocation=metadata r.q +1M")]),
    makes("s.q", &[same("resize s.q 20M")]),
    makes("v2.q", &[same("resize v2.q 2M")]),
    says(&[
        same("resize n.q 20M"),
        differs("amend -o compat=0.10 s.q", "bitmaps are not thrown away"),
    ]),
    makes("c.raw", &[same("resize c.raw +1M"), same("resize -f raw c.raw +1000")]),
    makes("c.raw", &[same("resize -f raw c.raw 1000"), same("resize -f raw --shrink c.raw 1000")]),
    makes("c.raw", &[same("resize -f raw --preallocation=falloc c.raw +1M")]),
    // snapshot
    says(&[same("snapshot -c a"), same("snapshot -c a -d b n.q"), same("snapshot -l -c y n.q")]),
    says(&[
        same("snapshot -a nope n.q"),
        same("snapshot -d nope n.q"),
        same("snapshot -U -c x n.q"),
    ]),
    says(&[same("snapshot -c x c.raw"), same("snapshot -a x c.raw"), same("snapshot -d x c.raw")]),
    says(&[same("snapshot -c x c.vmdk"), same("snapshot -c x nofile")]),
    makes("n.q", &[same("snapshot -c two n.q"), same("snapshot -l n.q")]),
    makes(
        "n.q",
        &[same("snapshot -c snap n.q"), same("snapshot -d snap n.q"), same("snapshot -l n.q")],
    ),
    makes(
        "n.q",
        &[same("snapshot -d snap n.q"), same("snapshot -l n.q"), same("snapshot -c new n.q")],
    ),
    says(&[differs("snapshot -a one s.q", "enabled bitmaps say that all has changed")]),
    makes(
        "s.q",
        &[
            same("bitmap --remove s.q bm0"),
            same("bitmap --remove s.q bm1"),
            same("snapshot -a one s.q"),
            same("snapshot -l s.q"),
        ],
    ),
    makes(
        "s.q",
        &[
            same("bitmap --remove s.q bm0"),
            same("bitmap --remove s.q bm1"),
            same("snapshot -a 2 s.q"),
            same("snapshot -d 1 s.q"),
            same("snapshot -l s.q"),
        ],
    ),
    makes(
        "s.q",
        &[same("snapshot -d one s.q"), same("snapshot -d two s.q"), same("snapshot -l s.q")],
    ),
    makes(
        "r.q",
        &[same("snapshot -c '' r.q"), same("snapshot -l r.q"), same("snapshot -q -c q r.q")],
    ),
    says(&[same("snapshot -c x small.q")]),
    makes(
        "ext.q",
        &[same("snapshot -c x ext.q"), same("snapshot -a x ext.q"), same("snapshot -d x ext.q")],
    ),
    // bitmap
    says(&[same("bitmap --add n.q"), same("bitmap --add n.q b"), same("bitmap --remove n.q c")]),
    says(&[
        same("bitmap --clear n.q c"),
        same("bitmap --enable n.q c"),
        same("bitmap --disable n.q c"),
    ]),
    says(&[
        same("bitmap --add -g 3k n.q d"),
        same("bitmap --add -g 256 n.q d"),
        same("bitmap --add -g 4G n.q d"),
    ]),
    says(&[
        same("bitmap --add -g foo n.q d"),
        same("bitmap --add c.raw d"),
        same("bitmap -g 64k n.q d"),
    ]),
    says(&[same("bitmap -g 64k --remove n.q b"), same("bitmap --merge nope n.q b")]),
    says(&[same("bitmap -F qcow2 --merge bm0 n.q b"), same("bitmap -b s.q --add n.q z")]),
    says(&[
        same("bitmap --remove --add n.q zz"),
        same("bitmap --add v2.q x"),
        same("bitmap --add n.q ''"),
    ]),
    says(&[
        same("bitmap --add nofile a"),
        same("bitmap --clear c.raw d"),
        same("bitmap --merge x c.raw d"),
    ]),
    says(&[same("bitmap --add -b s.q -F foo --merge bm0 n.q y")]),
    makes("n.q", &[same("bitmap --add n.q d"), same("bitmap --disable n.q d")]),
    makes(
        "n.q",
        &[
            same("bitmap --disable n.q b"),
            same("bitmap --enable n.q b"),
            same("bitmap --clear n.q b"),
        ],
    ),
    makes("n.q", &[same("bitmap --add -g 32k n.q d"), same("bitmap --merge d n.q b")]),
    makes("n.q", &[same("bitmap --add --remove n.q zz"), same("bitmap --remove n.q b")]),
    makes("n.q", &[same("bitmap -b s.q -F qcow2 --merge bm0 n.q b")]),
    makes("n.q", &[same("bitmap --add --disable --merge b n.q e")]),
    makes("a.q", &[same("bitmap --add a.q first"), same("check a.q")]),
    // amend
    says(&[same("amend n.q"), same("amend -o foo=4k n.q"), same("amend -o cluster_size=4k r.q")]),
    says(&[
        same("amend -o size=2M c.raw"),
        same("amend -o compat=v4 r.q"),
        same("amend -o refcount_bits=7 r.q"),
    ]),
    says(&[
        same("amend -o backing_file=a.q,backing_fmt=qcow2 r.q"),
        same("amend -o data_file=x r.q"),
    ]),
    says(&[
        same("amend -o lazy_refcounts=on v2.q"),
        same("amend -o size=1M nofile"),
        same("amend -o size=2M c.vmdk"),
    ]),
    says(&[same("amend -o preallocation=full r.q"), same("amend -o refcount_bits=8 v2.q")]),
    makes("v2.q", &[same("amend -o compat=v3 v2.q")]),
    makes(
        "v2.q",
        &[same("amend -o compat=v3,lazy_refcounts=on v2.q"), same("amend -o compat=v2 v2.q")],
    ),
    makes("r.q", &[same("amend -o refcount_bits=8 r.q"), same("amend -o refcount_bits=64 r.q")]),
    makes("r.q", &[same("amend -o compat=0.10 r.q"), same("amend -q -o compat=1.1 r.q")]),
    makes(
        "r.q",
        &[same("amend -o lazy_refcounts=on r.q"), same("amend -o lazy_refcounts=off r.q")],
    ),
    makes("r.q", &[same("amend -o size=20M r.q"), same("amend -o refcount_bits=16 r.q")]),
    makes("s.q", &[same("amend -o refcount_bits=32 s.q")]),
    // check -r
    says(&[same("check -r foo s.q"), same("check -r all -U s.q"), same("check -r all c.raw")]),
    makes("leak.q", &[same("check -r leaks leak.q"), same("check leak.q")]),
    makes("leak.q", &[same("check -r all --output json leak.q")]),
    makes("leak.q", &[same("check -q -r leaks leak.q")]),
    makes("a.q", &[same("check -r all a.q")]),
    makes("bad.q", &[differs("check -r all bad.q", "what is counted anew ends elsewhere")]),
];
