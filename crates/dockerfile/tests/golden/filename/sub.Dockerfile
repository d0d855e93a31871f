FROM scratch
COPY x y
