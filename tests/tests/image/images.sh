# SPDX-License-Identifier: Apache-2.0 OR MIT
# shellcheck shell=bash
# Images of every format and state that the cases name.
io() { qemu-io "$@" >/dev/null; }
mkdir x

qemu-img create -q c.raw 10M
io -f raw -c 'write -P 7 1M 192k' c.raw
head -c 1000 /dev/zero | tr '\0' 'x' >odd.raw
qemu-img create -q k1.raw 1M
qemu-img create -q k2.raw 2M
qemu-img create -q k3.raw 1M
io -f raw -c 'write -P 5 64k 1k' k3.raw
cp k3.raw k5.raw
cp k2.raw k4.raw
io -f raw -c 'write -P 5 1535k 1k' k4.raw

qemu-img create -q -f qcow2 a.q 6M
io -c 'write -P 1 0 256k' -c 'write -P 2 3M 64k' a.q
qemu-img create -q -f qcow2 -o compat=0.10 v2.q 1M
qemu-img create -q -f qcow2 -o cluster_size=4k,refcount_bits=1,lazy_refcounts=on small.q 3M
io -c 'write -P 1 5k 300k' small.q
qemu-img create -q -f qcow2 -o extended_l2=on,compression_type=zstd ext.q 4M
io -c 'write -P 1 66k 2k' -c 'write -z 1M 4k' ext.q
qemu-img create -q -f qcow2 -b a.q -F qcow2 s.q 10M
io -c 'write -P 3 1M 1M' s.q
qemu-img snapshot -c one s.q
io -c 'write -P 4 1M 64k' s.q
qemu-img snapshot -c two s.q
qemu-img bitmap --add s.q bm0
qemu-img bitmap --add --disable -g 32k s.q bm1
io -c 'write -P 9 2M 128k' -c 'write -z 0 64k' -c 'write -z -u 4M 64k' s.q
qemu-img create -q -f qcow2 -b s.q -F qcow2 s2.q
qemu-img create -q -f qcow2 -b k3.raw -F raw s3.q 2M
qemu-img create -q -f qcow2 -b ../a.q -F qcow2 x/dd.q
qemu-img create -q -f qcow2 -u -b nowhere.q -F qcow2 lost.q 1M
qemu-img create -q -f qcow2 -u -b nbd://localhost/x -F raw remote.q 1M
qemu-img create -q -f qcow2 n.q 10M
qemu-img snapshot -c snap n.q
qemu-img bitmap --add n.q b
qemu-img create -q -f qcow2 r.q 10M
io -c 'write -P 6 2M 100k' r.q
qemu-img create -q -f qcow2 full.q 10M
io -c 'write -P 6 0 10M' full.q
seq 300000 >text.raw
qemu-img convert -c -O qcow2 text.raw cc.q
qemu-img create -q -f qcow2 -o data_file=df.raw,data_file_raw=on df.q 1M
qemu-img create -q -f qcow2 --object secret,id=s,data=geheim \
    -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 e.q 1M
qemu-img create -q -f luks --object secret,id=s,data=geheim -o key-secret=s,iter-time=10 l.luks 1M

qemu-img create -q -f vmdk c.vmdk 10M
io -c 'write -P 8 1M 100k' c.vmdk
qemu-img create -q -f vmdk -b c.vmdk -F vmdk child.vmdk
qemu-img create -q -f vmdk -o subformat=monolithicFlat mf.vmdk 10M
qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse ts.vmdk 3G
io -c 'write -P 8 2G 100k' ts.vmdk
qemu-img convert -O vmdk -o subformat=streamOptimized c.raw so.vmdk
qemu-img create -q -f vpc c.vpc 10M
io -f vpc -c 'write -P 8 3M 100k' c.vpc
qemu-img create -q -f vpc -o subformat=fixed fixed.vpc 1M
qemu-img create -q -f vhdx c.vhdx 10M
io -c 'write -P 8 3M 100k' c.vhdx
qemu-img create -q -f vdi c.vdi 10M
io -c 'write -P 8 3M 100k' c.vdi
qemu-img create -q -f qed c.qed 10M
io -c 'write -P 8 3M 100k' c.qed
qemu-img create -q -f parallels c.hds 10M

# A leaked cluster; then one in use that is not counted as well.
cp r.q leak.q
dd if=/dev/zero of=leak.q bs=64k seek=40 count=1 2>/dev/null
printf '\000\001' | dd of=leak.q bs=1 seek=$((0x20000 + 2 * 40)) conv=notrunc 2>/dev/null
cp leak.q bad.q
printf '\000\000' | dd of=bad.q bs=1 seek=$((0x20000 + 2 * 3)) conv=notrunc 2>/dev/null
