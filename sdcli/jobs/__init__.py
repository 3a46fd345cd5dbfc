"""Job lines -> the images they ask for -> who draws and who writes them. The story over them is `sdcli.batch`."""
