#!/bin/sh
names=/usr/share/hello/names.txt
[ -f "$names" ] || names=/src/names.txt
while read -r name; do
	echo "${GREETING:-Hi}, $name!"
done <"$names"
echo "@COUNT@ names greeted by $(id -un)"
