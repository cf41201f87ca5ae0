# SPDX-License-Identifier: Apache-2.0 OR MIT
# shellcheck shell=bash
# Images and chains that the cases move.
io() { qemu-io "$@" >/dev/null; }
mkdir x

qemu-img create -q c.raw 6M
io -f raw -c 'write -P 7 1M 192k' -c 'write -P 8 3M 1k' -c 'write -z 4M 64k' c.raw
head -c 1000 /dev/zero | tr '\0' 'x' >odd.raw
qemu-img create -q two.raw 2M
io -f raw -c 'write -P 5 0 1M' two.raw
seq 400000 >text.raw
qemu-img create -q -f qcow2 a.q 6M
io -c 'write -P 1 0 256k' -c 'write -P 2 3M 64k' -c 'write -z 5M 64k' a.q
qemu-img create -q -f qcow2 -o extended_l2=on ext.q 4M
io -c 'write -P 1 66k 2k' -c 'write -z 1M 4k' -c 'write -P 4 2M 300k' ext.q
qemu-img convert -c -O qcow2 text.raw cc.q
qemu-img create -q -f qcow2 n.q 6M
io -c 'write -P 6 1M 128k' n.q
qemu-img snapshot -c one n.q
io -c 'write -P 9 1M 64k' n.q
qemu-img bitmap --add n.q b0
io -c 'write -P 3 2M 64k' n.q
qemu-img create -q -f qcow2 bad.q 4M
io -c 'write -P 1 0 1M' bad.q
truncate -s 700k bad.q

for name in vmdk vpc vhdx vdi qed; do
    qemu-img create -q -f $name c.$name 6M
    io -f $name -c 'write -P 8 3M 100k' c.$name
done
qemu-img create -q -f vmdk -b c.vmdk -F vmdk child.vmdk
io -c 'write -P 3 1M 64k' child.vmdk

# base.q <- mid.q <- top.q, with all kinds of clusters over one another.
qemu-img create -q -f qcow2 base.q 4M
io -c 'write -P 1 0 1M' base.q
qemu-img create -q -f qcow2 -b base.q -F qcow2 mid.q
io -c 'write -P 2 1M 1M' -c 'write -P 2 256k 64k' mid.q
qemu-img create -q -f qcow2 -b mid.q -F qcow2 top.q
io -c 'write -P 3 2M 512k' -c 'write -z 0 64k' -c 'write -P 3 1M 3k' top.q
# Others that top.q can be based on: equal here and there, longer, shorter, nothing.
cp base.q like.q
io -c 'write -P 2 1M 512k' -c 'write -P 9 512k 64k' -c 'write -P 9 3M 64k' like.q
qemu-img create -q -f qcow2 long.q 8M
io -c 'write -P 5 3M 5M' long.q
qemu-img create -q -f qcow2 -o cluster_size=4k short.q 1M
io -c 'write -P 1 100k 200k' short.q
qemu-img create -q -f qcow2 alone.q 4M
io -c 'write -P 4 3M 64k' alone.q
qemu-img create -q -f qcow2 -b base.q -F qcow2 grown.q 6M
io -c 'write -P 3 5M 64k' grown.q
qemu-img create -q -f qcow2 -b base.q -F qcow2 cut.q 1M
io -c 'write -P 3 512k 64k' cut.q
qemu-img create -q -f qcow2 -b two.raw -F raw onraw.q 3M
io -c 'write -P 3 1M 2M' onraw.q
qemu-img create -q -f qcow2 -o compat=0.10 -b base.q -F qcow2 v2.q
io -c 'write -P 3 1M 64k' v2.q
qemu-img create -q -f qcow2 -o extended_l2=on -b base.q -F qcow2 sub.q
io -c 'write -P 3 513k 3k' -c 'write -z 600k 4k' sub.q
qemu-img create -q -f qcow2 -b base.q -F qcow2 snapped.q
io -c 'write -P 3 1M 64k' snapped.q
qemu-img snapshot -c s snapped.q
qemu-img create -q -f qcow2 -u -b nowhere.q -F qcow2 lost.q 1M
