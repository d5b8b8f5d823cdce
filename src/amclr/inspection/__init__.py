"""What is in a data set: counts, caption statistics, rejected rows, contact sheets, look-alikes (`amclr inspect`)."""
