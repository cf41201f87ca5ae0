// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Words that move what is in images, and the images that have to come out the same.

use crate::{Case, differs, same};

/// Words one after another, in fresh folders.
pub(crate) struct Row {
    pub(crate) cases: &'static [Case],
    /// The images that have to be the same afterwards, for their guests and for qemu-img.
    pub(crate) results: &'static [&'static str],
    /// The same files are there afterwards.
    pub(crate) is_strict: bool,
}

/// The images `results` have to come out the same.
const fn makes(results: &'static [&'static str], cases: &'static [Case]) -> Row {
    Row { cases, results, is_strict: true }
}

/// Only the words matter.
const fn says(cases: &'static [Case]) -> Row {
    Row { cases, results: &[], is_strict: false }
}

/// Why a copy over a base is another one here.
const OTHER: &str = "the copy reads as its source, whatever it is based on: qemu-img leaves out \
                     what the source's first image does not have";

pub(crate) const CONVERT: &[Row] = &[
    // The words.
    says(&[same("convert"), same("convert c.raw"), same("convert nofile t.q")]),
    says(&[same("convert -O foo c.raw t.q"), same("convert -f foo c.raw t.q")]),
    says(&[same("convert -O dmg c.raw t.dmg"), same("convert c.raw /nodir/t.raw")]),
    says(&[same("convert -S 3 c.raw t.q"), same("convert -S 17M c.raw t.q")]),
    says(&[same("convert -S foo c.raw t.q"), same("convert -m 0 c.raw t.q")]),
    says(&[same("convert -m 17 c.raw t.q"), same("convert -m x c.raw t.q")]),
    says(&[same("convert -r foo c.raw t.q"), same("convert -t foo c.raw t.q")]),
    says(&[same("convert -T foo c.raw t.q"), same("convert -c c.raw t.raw")]),
    says(&[same("convert -c -O vhdx c.raw t.vhdx"), same("convert -C -c -O qcow2 c.raw t.q")]),
    says(&[same("convert -C -S 4k c.raw t.q"), same("convert --target-is-zero c.raw t.raw")]),
    says(&[same("convert -n c.raw nofile"), same("convert -n -o size=1M c.raw two.raw")]),
    says(&[same("convert -n -O raw -f raw c.raw two.raw")]),
    says(&[same("convert -B a.q -O qcow2 c.raw t.q"), same("convert -l nope n.q t.raw")]),
    says(&[same("convert -B a.q -F qcow2 -O raw c.raw t.raw")]),
    says(&[same("convert -l one c.raw t.raw"), same("convert -l one n.q a.q t.raw")]),
    says(&[same("convert -B a.q -F qcow2 -O qcow2 c.raw two.raw t.q")]),
    says(&[same("convert --bitmaps -O raw n.q t.raw")]),
    says(&[same("convert --skip-broken-bitmaps -O qcow2 n.q t.q")]),
    says(&[same("convert --target-image-opts c.raw driver=raw,file.filename=two.raw")]),
    says(&[same("convert --image-opts -f raw driver=raw,file.filename=c.raw t.raw")]),
    says(&[same("convert -O qcow2 -o foo=1 c.raw t.q"), same("convert -O qcow2 -o , c.raw t.q")]),
    says(&[same("convert -O qcow2 -o cluster_size=3 c.raw t.q"), same("convert lost.q t.raw")]),
    says(&[same("convert -n -f raw -O raw c.raw c.raw")]),
    // Formats.
    makes(&["t.raw"], &[same("convert c.raw t.raw")]),
    makes(&["t.raw"], &[same("convert -f raw -O raw c.raw t.raw"), same("convert a.q t.raw")]),
    makes(&["t.raw"], &[same("convert odd.raw t.raw")]),
    makes(&["t.q"], &[same("convert -O qcow2 odd.raw t.q")]),
    makes(&["t.q"], &[same("convert -O qcow2 c.raw t.q"), same("convert -O qcow2 a.q t.q")]),
    makes(&["t.q"], &[same("convert -f qcow2 -O qcow2 ext.q t.q"), same("compare ext.q t.q")]),
    makes(&["t.q"], &[same("convert -O qcow2 cc.q t.q"), same("convert -O qcow2 top.q t.q")]),
    makes(&["t.vmdk"], &[same("convert -O vmdk a.q t.vmdk")]),
    makes(&["t.vpc"], &[same("convert -O vpc -o force_size=on a.q t.vpc")]),
    makes(&["t.vpc"], &[same("convert -O vpc a.q t.vpc")]),
    makes(&["t.vhdx"], &[same("convert -O vhdx a.q t.vhdx")]),
    makes(&["t.q"], &[same("convert -O qcow2 c.vmdk t.q"), same("convert -O qcow2 c.vpc t.q")]),
    makes(&["t.q"], &[same("convert -O qcow2 c.vhdx t.q"), same("convert -O qcow2 c.vdi t.q")]),
    makes(&["t.q"], &[same("convert -O qcow2 c.qed t.q"), same("convert -O qcow2 child.vmdk t.q")]),
    // Options of the target.
    makes(&["t.q"], &[same("convert -O qcow2 -o cluster_size=4k,compat=0.10 a.q t.q")]),
    makes(&["t.q"], &[same("convert -O qcow2 -o cluster_size=2M -o refcount_bits=1 a.q t.q")]),
    makes(&["t.q"], &[same("convert -O qcow2 -o extended_l2=on,lazy_refcounts=on c.raw t.q")]),
    makes(&["t.q"], &[same("convert -O qcow2 -o preallocation=metadata c.raw t.q")]),
    makes(&["t.q"], &[same("convert -O qcow2 -o preallocation=full c.raw t.q")]),
    makes(&["t.raw"], &[same("convert -o preallocation=full a.q t.raw")]),
    makes(&["t.vmdk"], &[same("convert -O vmdk -o subformat=streamOptimized c.raw t.vmdk")]),
    makes(
        &["t.vmdk"],
        &[same("convert -O vmdk -o subformat=monolithicFlat,adapter_type=lsilogic c.raw t.vmdk")],
    ),
    makes(&["t.vmdk"], &[same("convert -O vmdk -o subformat=twoGbMaxExtentSparse c.raw t.vmdk")]),
    makes(&["t.vhdx"], &[same("convert -O vhdx -o subformat=fixed,block_size=1M c.raw t.vhdx")]),
    // How it is written.
    makes(&["t.q"], &[same("convert -c -O qcow2 text.raw t.q")]),
    makes(&["t.q"], &[same("convert -c -W -m 4 -O qcow2 text.raw t.q")]),
    makes(&["t.q"], &[same("convert -c -O qcow2 -o compression_type=zstd text.raw t.q")]),
    makes(&["t.raw"], &[same("convert -S 0 a.q t.raw")]),
    makes(&["t.q"], &[same("convert -S 0 -O qcow2 a.q t.q")]),
    makes(&["t.q"], &[same("convert -S 64k -m 1 -O qcow2 c.raw t.q")]),
    makes(&["t.raw"], &[same("convert -C c.raw t.raw"), same("convert -W -m 16 a.q t.raw")]),
    makes(&["t.q"], &[same("convert -t writeback -T none -O qcow2 c.raw t.q")]),
    makes(&["t.q"], &[same("convert -t none -O qcow2 c.raw t.q")]),
    makes(&["t.q"], &[same("convert -r 100M -O qcow2 c.raw t.q")]),
    makes(&["t.q"], &[same("convert -r 0 -q -O qcow2 c.raw t.q")]),
    makes(&["t.q"], &[same("convert -p -O qcow2 c.raw t.q"), same("convert -p -q a.q t.q")]),
    // Onto what is there.
    makes(&["alone.q"], &[same("convert -n -O qcow2 base.q alone.q")]),
    makes(&["long.q"], &[same("convert -n -O qcow2 a.q long.q")]),
    makes(&["c.raw"], &[same("convert -n -O raw a.q c.raw"), same("convert -n two.raw c.raw")]),
    makes(
        &["t.q"],
        &[same("create -q -f qcow2 t.q 6M"), same("convert -n --target-is-zero -O qcow2 a.q t.q")],
    ),
    makes(
        &["t.q"],
        &[
            same("create -q -f qcow2 t.q 6M"),
            same("convert -n --target-image-opts a.q driver=qcow2,file.filename=t.q"),
        ],
    ),
    makes(&["c.vmdk"], &[same("convert -n -O vmdk a.q c.vmdk")]),
    makes(&["c.vpc"], &[same("convert -n -f raw -O vpc c.raw c.vpc")]),
    makes(&["c.vhdx"], &[same("convert -n -O vhdx a.q c.vhdx")]),
    // Over a base.
    says(&[
        same("convert -O qcow2 -B base.q -F qcow2 top.q t.q"),
        differs("compare t.q top.q", OTHER),
    ]),
    says(&[
        same("convert -O qcow2 -B like.q -F qcow2 top.q t.q"),
        differs("compare t.q top.q", OTHER),
    ]),
    makes(&["t.q"], &[same("convert -O qcow2 -B mid.q -F qcow2 top.q t.q")]),
    says(&[
        same("convert -O qcow2 -B long.q -F qcow2 top.q t.q"),
        differs("compare t.q top.q", OTHER),
    ]),
    makes(&["t.q"], &[same("convert -O qcow2 -B short.q -F qcow2 alone.q t.q")]),
    makes(&["t.q"], &[same("convert -O qcow2 -o backing_file=base.q,backing_fmt=qcow2 mid.q t.q")]),
    says(&[
        same("convert -c -O qcow2 -B like.q -F qcow2 top.q t.q"),
        differs("compare t.q top.q", OTHER),
    ]),
    makes(&["t.vmdk"], &[same("convert -O vmdk -B c.vmdk -F vmdk child.vmdk t.vmdk")]),
    // Parts, and several.
    makes(&["t.raw"], &[same("convert -l one n.q t.raw"), same("compare n.q t.raw")]),
    makes(&["t.q"], &[same("convert -l snapshot.id=1 -O qcow2 n.q t.q")]),
    makes(&["t.q"], &[same("convert -l snapshot.name=one -O qcow2 n.q t.q")]),
    makes(&["t.raw"], &[same("convert two.raw a.q c.vhdx t.raw")]),
    makes(&["t.q"], &[same("convert -O qcow2 two.raw two.raw t.q")]),
    makes(&["t.q"], &[same("convert --bitmaps -O qcow2 n.q t.q")]),
    makes(&["t.q"], &[same("convert --bitmaps --skip-broken-bitmaps -O qcow2 n.q t.q")]),
    makes(&["t.q"], &[same("convert -U --salvage -O qcow2 a.q t.q")]),
    says(&[differs("convert bad.q t.raw", "clusters that are not in the file are no zeroes")]),
    makes(&["t.raw"], &[same("convert --image-opts driver=qcow2,file.filename=a.q t.raw")]),
    makes(
        &["t.raw"],
        &[same("convert json:{\"driver\":\"qcow2\",\"file.filename\":\"a.q\"} t.raw")],
    ),
    makes(&["x/t.q"], &[same("convert -O qcow2 -B ../mid.q -F qcow2 top.q x/t.q")]),
];

pub(crate) const CHAINS: &[Row] = &[
    // rebase: the words.
    says(&[same("rebase"), same("rebase top.q"), same("rebase -b base.q -F qcow2 top.q extra")]),
    says(&[same("rebase -b base.q top.q"), same("rebase -u -b base.q top.q")]),
    says(&[same("rebase -b base.q -F foo top.q"), same("rebase -u -b base.q -F foo top.q")]),
    says(&[same("rebase -b nofile -F qcow2 top.q"), same("rebase -b base.q -F qcow2 nofile")]),
    says(&[same("rebase -b base.q -F qcow2 c.raw"), same("rebase -c -b base.q -F qcow2 c.raw")]),
    says(&[same("rebase -b base.q -F qcow2 c.vmdk"), same("rebase -b base.q -F qcow2 lost.q")]),
    says(&[same("rebase -t foo -b base.q -F qcow2 top.q")]),
    says(&[same("rebase -T foo -b base.q -F qcow2 top.q")]),
    says(&[same("rebase -b top.q -F qcow2 top.q"), same("rebase -f raw -b base.q -F qcow2 top.q")]),
    says(&[same("rebase --image-opts -f qcow2 -b base.q -F qcow2 top.q")]),
    // rebase: the images.
    makes(&["top.q"], &[same("rebase -b base.q -F qcow2 top.q"), same("rebase -b '' top.q")]),
    makes(&["top.q"], &[same("rebase -b like.q -F qcow2 top.q")]),
    makes(&["top.q"], &[same("rebase -b long.q -F qcow2 top.q")]),
    makes(&["top.q"], &[same("rebase -b short.q -F qcow2 top.q")]),
    makes(&["top.q"], &[same("rebase -b text.raw -F raw top.q")]),
    makes(&["top.q"], &[same("rebase -c -b text.raw -F raw top.q")]),
    makes(&["top.q"], &[same("rebase -b '' top.q"), same("rebase -b base.q -F qcow2 top.q")]),
    makes(&["alone.q"], &[same("rebase -b long.q -F qcow2 alone.q")]),
    makes(&["alone.q"], &[same("rebase -f qcow2 -b two.raw -F raw alone.q")]),
    makes(&["alone.q"], &[same("rebase -U -b base.q -F qcow2 alone.q")]),
    makes(&["grown.q"], &[same("rebase -b long.q -F qcow2 grown.q")]),
    makes(&["cut.q"], &[same("rebase -b long.q -F qcow2 cut.q"), same("rebase -b '' cut.q")]),
    makes(&["v2.q"], &[same("rebase -b long.q -F qcow2 v2.q"), same("rebase -b '' v2.q")]),
    makes(
        &["sub.q"],
        &[same("rebase -b long.q -F qcow2 sub.q"), same("rebase -b like.q -F qcow2 sub.q")],
    ),
    makes(&["onraw.q"], &[same("rebase -b long.q -F qcow2 onraw.q")]),
    makes(&["snapped.q"], &[same("rebase -b like.q -F qcow2 snapped.q")]),
    makes(&["top.q"], &[same("rebase -u -b base.q -F qcow2 top.q"), same("rebase -u -b '' top.q")]),
    says(&[
        same("convert -O raw top.q before.raw"),
        same("rebase -b base.q -F raw top.q"),
        differs(
            "compare -F raw top.q before.raw",
            "qemu-img takes the file for the base that it was, in whatever format, and loses data",
        ),
    ]),
    makes(&["top.q"], &[same("rebase -u top.q")]),
    makes(&["lost.q"], &[same("rebase -u -b short.q -F qcow2 lost.q")]),
    makes(&["top.q"], &[same("rebase -p -b base.q -F qcow2 top.q")]),
    makes(&["top.q"], &[same("rebase -q -p -b like.q -F qcow2 top.q")]),
    makes(&["top.q"], &[same("rebase -p -u -b base.q -F qcow2 top.q")]),
    makes(
        &["top.q"],
        &[same("rebase --image-opts driver=qcow2,file.filename=top.q -b base.q -F qcow2")],
    ),
    // commit: the words.
    says(&[same("commit"), same("commit base.q"), same("commit c.raw"), same("commit nofile")]),
    says(&[same("commit -b nofile top.q"), same("commit -b top.q top.q")]),
    says(&[same("commit -t foo top.q"), same("commit -r foo top.q"), same("commit c.vmdk")]),
    says(&[same("commit -f raw top.q"), same("commit top.q extra"), same("commit -f foo top.q")]),
    says(&[same("commit lost.q")]),
    // commit: the images.
    makes(&["top.q", "mid.q", "base.q"], &[same("commit top.q"), same("map --output json top.q")]),
    makes(&["top.q", "mid.q"], &[same("commit -p top.q"), same("commit mid.q")]),
    makes(&["top.q", "mid.q"], &[same("commit -d top.q")]),
    makes(&["top.q", "mid.q", "base.q"], &[same("commit -b base.q top.q")]),
    makes(&["top.q", "mid.q", "base.q"], &[same("commit -b ./base.q -d -q -p top.q")]),
    makes(&["top.q", "mid.q"], &[same("commit -b mid.q top.q"), same("commit -r 0 top.q")]),
    makes(&["top.q", "mid.q"], &[same("commit -r 100M top.q"), same("commit -f qcow2 top.q")]),
    makes(&["grown.q", "base.q"], &[same("commit grown.q")]),
    makes(&["cut.q", "base.q"], &[same("commit cut.q")]),
    makes(&["onraw.q", "two.raw"], &[same("commit onraw.q")]),
    makes(&["v2.q", "base.q"], &[same("commit v2.q")]),
    makes(&["sub.q", "base.q"], &[same("commit sub.q")]),
    makes(&["snapped.q", "base.q"], &[same("commit snapped.q"), same("snapshot -a s snapped.q")]),
    makes(&["c.vmdk"], &[same("commit child.vmdk")]),
    makes(&["top.q", "mid.q"], &[same("commit --image-opts driver=qcow2,file.filename=top.q")]),
];

pub(crate) const OTHERS: &[Row] = &[
    // dd
    says(&[same("dd"), same("dd if=c.raw"), same("dd of=t.raw"), same("dd foo if=a")]),
    says(&[same("dd if=c.raw of=t.raw foo=1"), same("dd if=c.raw of=t.raw conv=notrunc")]),
    says(&[same("dd bs=0 if=c.raw of=t.raw"), same("dd bs=foo if=c.raw of=t.raw")]),
    says(&[same("dd bs=-1 if=c.raw of=t.raw"), same("dd bs=3G if=c.raw of=t.raw")]),
    says(&[same("dd count=foo if=c.raw of=t.raw"), same("dd count= if=c.raw of=t.raw")]),
    says(&[same("dd skip=foo if=c.raw of=t.raw"), same("dd skip=-1 if=c.raw of=t.raw")]),
    says(&[same("dd count=1k if=a.q of=t.raw"), same("dd -O foo if=a.q of=t.raw")]),
    says(&[same("dd -f foo if=a.q of=t.raw"), same("dd if=nofile of=t.raw")]),
    says(&[same("dd if=a.q of=/nodir/t.raw"), same("dd -O dmg if=a.q of=t.dmg")]),
    says(&[same("dd --image-opts -f raw if=c.raw of=t.raw"), same("dd if=a.q of=t.raw extra")]),
    makes(&["t.raw"], &[same("dd if=c.raw of=t.raw")]),
    makes(&["t.raw"], &[same("dd -f raw if=c.raw of=t.raw bs=1M count=2")]),
    makes(&["t.raw"], &[same("dd if=a.q of=t.raw bs=1M skip=3"), same("dd if=c.vhdx of=t.raw")]),
    makes(&["t.raw"], &[same("dd if=a.q of=t.raw bs=1M skip=6")]),
    makes(&["t.raw"], &[same("dd if=a.q of=t.raw bs=1M skip=7")]),
    makes(&["t.raw"], &[same("dd -f raw if=c.raw of=t.raw bs=1M skip=10 count=2")]),
    makes(
        &["t.raw"],
        &[same("dd if=a.q of=t.raw bs=1M count=10"), same("dd count=0 if=a.q of=t.raw")],
    ),
    makes(&["t.raw"], &[same("dd bs=3 count=5 if=a.q of=t.raw")]),
    makes(&["t.raw"], &[same("dd -f raw bs=300 if=odd.raw of=t.raw")]),
    makes(&["t.q"], &[same("dd -O qcow2 bs=64k count=9 if=a.q of=t.q")]),
    makes(&["t.vpc"], &[same("dd -O vpc if=a.q of=t.vpc"), same("dd -U if=a.q of=t.vpc -O vpc")]),
    makes(&["t.raw"], &[same("dd if=c.raw if=a.q of=t.raw"), same("dd if=top.q of=t.raw")]),
    makes(&["t.raw"], &[same("dd --image-opts if=driver=qcow2,file.filename=a.q of=t.raw")]),
    says(&[
        same("dd if=a.q of=t.raw bs=64k count=2 skip=3"),
        differs("info t.raw", "count is what is copied, as in dd, and not where it ends"),
    ]),
    // bench
    says(&[same("bench"), same("bench nofile"), same("bench -f foo a.q"), same("bench a.q extra")]),
    says(&[same("bench -c foo a.q"), same("bench -c 0 a.q"), same("bench -c -1 a.q")]),
    says(&[same("bench -c 1k a.q"), same("bench -d 0 a.q"), same("bench -d foo a.q")]),
    says(&[same("bench -d 3000000000 a.q"), same("bench -o foo a.q"), same("bench -o -1 a.q")]),
    says(&[same("bench -s 0 a.q"), same("bench -s foo a.q"), same("bench -s 3G a.q")]),
    says(&[same("bench -S foo a.q"), same("bench -S -1 a.q"), same("bench -S 3G a.q")]),
    says(&[same("bench -w --pattern 300 a.q"), same("bench -w --pattern foo a.q")]),
    says(&[same("bench --flush-interval 4 a.q"), same("bench -w --flush-interval foo a.q")]),
    says(&[same("bench -w --flush-interval 63 a.q"), same("bench -w --flush-interval -1 a.q")]),
    says(&[same("bench -w --flush-interval 4 -d 8 --no-drain a.q"), same("bench -i foo a.q")]),
    says(&[same("bench -t foo a.q"), same("bench -n a.q"), same("bench -i native a.q")]),
    says(&[same("bench -U -w -c 1 a.q"), same("bench --image-opts -f qcow2 a.q")]),
    says(&[same("bench -o 7M -c 5 a.q"), same("bench -s 8M -c 5 a.q")]),
    says(&[
        same("bench -c 10 a.q"),
        same("bench -q -c 10 -f raw c.raw"),
        same("bench -U -c 1 a.q"),
    ]),
    says(&[same("bench -o 1M -s 64k -S 128k -c 50 a.q"), same("bench -S 0 -d 1 -c 3 a.q")]),
    says(&[same("bench -i threads -c 9 a.q"), same("bench -i io_uring -c 9 a.q")]),
    says(&[same("bench -n -t none -c 9 -f raw c.raw"), same("bench --pattern 3 -c 9 a.q")]),
    says(&[same("bench -s 1k -c 10000 -o 100 a.q"), same("bench -c 0x10 a.q")]),
    says(&[same("bench -s 512 -c 6000 -f raw text.raw"), same("bench -c 1 -f raw odd.raw")]),
    makes(&["a.q"], &[same("bench -w -c 10 --pattern 5 a.q")]),
    makes(&["a.q"], &[same("bench -w --flush-interval 4 -d 2 -c 10 --pattern 9 -o 1M a.q")]),
    makes(&["a.q"], &[same("bench -w --flush-interval 64 --no-drain -c 200 --pattern 255 a.q")]),
    makes(&["c.raw"], &[same("bench -w -f raw -s 64k -S 192k -c 300 --pattern 7 c.raw")]),
    // compare
    says(&[same("compare"), same("compare a.q"), same("compare a.q nofile")]),
    says(&[same("compare a.q a.q extra"), same("compare -f foo a.q a.q")]),
    says(&[same("compare c.raw a.q"), same("compare -q c.raw a.q"), same("compare top.q top.q")]),
    says(&[same("compare two.raw c.raw"), same("compare -s two.raw c.raw")]),
    says(&[
        same("compare cc.q text.raw"),
        differs("compare -s cc.q text.raw", "compressed or not, data is data"),
    ]),
    says(&[
        same("compare odd.raw odd.raw"),
        same("compare -p a.q a.q"),
        same("compare -s a.q a.q"),
    ]),
    says(&[same("compare -s alone.q base.q"), same("compare alone.q base.q")]),
    says(&[
        same("compare grown.q base.q"),
        same("compare cut.q base.q"),
        same("compare lost.q a.q"),
    ]),
    says(&[same("compare mid.q like.q"), same("compare -f qcow2 -F raw mid.q c.raw")]),
    says(&[
        same("compare n.q c.raw"),
        same("compare long.q alone.q"),
        same("compare c.vdi c.vhdx"),
    ]),
];
