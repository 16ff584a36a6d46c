"""Files on the host whose contents guests hold in memory: kernels, initrds, disks, folders.

    pages      digests of pages, and where each comes from
    contents   which kind a file is, and its contents as guests have them in memory
    kernel     a bzImage: as it is loaded, and unpacked
    archives   what an initrd unpacks to
    qcow2      the layers of a qcow2 image, and what qemu-img may open
    extfs      the files of a disk image's filesystems, by name
    cache      each file is digested once

It only reads, and knows no VM.
"""
