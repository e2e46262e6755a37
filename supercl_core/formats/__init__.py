"""From the files of a case to its image and its label map: volumes, DICOM series, 2-D images, arrays."""
